"""moecomm in libraries that users already train with. Each module needs its library, and nothing of moecomm imports one."""
