"""Ask PyPI which of the locked packages have known vulnerabilities: ``python .ci/audit.py requirements.lock``, or ``make audit``.

Ends with 0 where it knows of each package that there are none, with 1 where there are some, and with 2 where it does not know, since the
index was not reached or does not tell of a package: pip-audit itself, which asks, ends with 0 then.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CLEAN, FOUND, UNKNOWN = 0, 1, 2


def main() -> int:
    lock = Path(sys.argv[1]).read_text()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as public:
        public.write(as_published(lock))
        public.flush()
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json"]
        done = subprocess.run([*command, "--requirement", public.name], capture_output=True, text=True)
    code, message = verdict(done.stdout, done.stderr)
    print(message)
    return code


def as_published(lock: str) -> str:
    """The lock with the versions that advisories speak of: of torch's build for CPUs, 2.13.0+cpu, that is 2.13.0."""
    return re.sub(r"^(\S+==[^\s+]+)\+\S+", r"\1", lock, flags=re.MULTILINE)


def verdict(report: str, said: str) -> tuple[int, str]:
    """The exit code and the message for what pip-audit printed."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError):
        return UNKNOWN, f"not audited: the index could not be reached, or pip-audit failed:\n{said.strip()}"
    found = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {v['fix_versions'] or 'none'}" for p in packages for v in p.get("vulns", [])
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if found:
        return FOUND, "\n".join(["known vulnerabilities:", *found, *([f"not audited: {', '.join(unknown)}"] if unknown else [])])
    if not packages or len(unknown) == len(packages):
        return UNKNOWN, f"not audited: the index that is reached from here tells of vulnerabilities of none of {len(packages)} packages"
    if unknown:
        return UNKNOWN, f"not audited: {', '.join(unknown)}; no known vulnerability in the other {len(packages) - len(unknown)} packages"
    return CLEAN, f"no known vulnerability in {len(packages)} packages"


if __name__ == "__main__":
    sys.exit(main())
