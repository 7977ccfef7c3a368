"""Train a model of Hugging Face Transformers with its `Trainer`: FSDP2 shards all of it, and moecomm spreads its experts over the ranks.

    torchrun --nproc-per-node 4 tutorials/07_transformers.py

The script prints the bits per byte on held-out text after the training. Then it saves the model, loads it on one process with
Transformers' own experts, and prints by how much the logits differ.
"""

# %% Why
# The experts of Transformers' models are a part that can be replaced. The import of `moecomm.integrations.transformers` registers "moecomm"
# under the names that Transformers looks up: no model code changes, and the checkpoint is an ordinary one. transformers >= 5.23.

import math
from pathlib import Path

import torch
import torch.distributed as dist
from demo.data import baselines, batch, read, windows  # tutorials/demo/data.py
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import moecomm.integrations.transformers  # noqa: F401 - registers "moecomm"

LENGTH, STEPS, BATCH = 64, 40, 8  # bytes of a sequence, steps, sequences of a rank in a step
RUN = Path("runs/transformers")

# %% The model
# A Qwen3-MoE of 2 layers with 8 experts each, of which a token takes 2. Its tokens are bytes. With `output_router_logits` the loss contains
# the balance loss of the router.

CONFIG = Qwen3MoeConfig(
    vocab_size=256, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_experts=8, num_experts_per_tok=2, max_position_embeddings=LENGTH, output_router_logits=True,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


# %% Spread over the ranks
# Transformers shards a model while it loads it. So rank 0 writes the new model first. All P ranks share the dense parameters (FSDP2). Two
# ranks share the 8 experts: each computes 4 of them, whose weights FSDP2 shards over the P / 2 ranks that have the same ones. Each rank has
# tokens of its own. A token travels once to each rank that has one of its experts.


def spread_model() -> PreTrainedModel:
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(RUN / "new")
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=2, ep_implementation="moecomm")
    return AutoModelForCausalLM.from_pretrained(RUN / "new", distributed_config=config)


# %% The training
# `Trainer` sees that the model is already distributed, and does not wrap it again. It clips the gradients of both meshes by one norm.


def train(model: PreTrainedModel, text: Tensor) -> None:
    sequences = batch(text, STEPS * BATCH * dist.get_world_size(), LENGTH - 1, seed=0, step=0).long()  # [sequences, LENGTH]
    arguments = TrainingArguments(
        str(RUN), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-3, warmup_steps=4, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": each, "labels": each} for each in sequences]).train()


# %% What it has learned


@torch.no_grad()
def logits_of(model: PreTrainedModel, held_out: Tensor) -> Tensor:
    """[sequences, LENGTH, 256]."""
    logits: Tensor = model.eval()(input_ids=held_out.to(model.device)).logits
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits).cpu()


def bits_per_byte(logits: Tensor, held_out: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item() / math.log(2)


# %% Save it, and load it without moecomm
# `save_pretrained` gathers the model on rank 0. The file has the model's own names and shapes, and nothing of moecomm or of the ranks.


def main() -> None:
    dist.init_process_group()
    text = read(None)
    held_out = windows(text.held_out, 32, LENGTH - 1).long()  # [32, LENGTH]
    model = spread_model()
    train(model, text.train)
    logits = logits_of(model, held_out)  # all ranks: each has a part of the model
    model.save_pretrained(RUN / "trained")
    if dist.get_rank() == 0:
        unigram, _ = baselines(text.train, held_out.to(torch.uint8))
        print(f"bits per byte: {bits_per_byte(logits, held_out):.2f} after {STEPS} steps; a unigram has {unigram:.2f}")
        alone = AutoModelForCausalLM.from_pretrained(RUN / "trained")  # with Transformers' own experts, on this process
        print(f"largest difference of a logit: {(logits_of(alone, held_out) - logits).abs().max():.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
