"""Train `tales` and `tales-draft` on this CPU: `python -m common.models.training.train`.

From nothing but seeds: stories are generated, a SentencePiece tokenizer is trained on them, then the target, then
its draft, which learns to say what the target says. Everything lands in common/models/, in Hugging Face layout,
with the loss curves beside it. Interrupted, the same command goes on from the last checkpoint (`.training/`).

The model is lesson 2's `Llama` itself. It knows no batch axis: a batch of B rows of S tokens is laid flat to
B * S tokens, and `attend`, which is ours to hand in, is the only place that remembers where rows begin.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from common.models.training.stories import story
from solutions.llama_pytorch import Attend, Llama, parse_config

MODELS = Path(__file__).parents[1]
SCRATCH = Path(__file__).parent / ".training"
COMMAND = "python -m common.models.training.train"

SEED = 2
NUM_STORIES = 12_000
VOCAB_SIZE = 1024
ROW_LENGTH = 512  # a whole story, and the beginning of the next
STEPS_BETWEEN_CHECKPOINTS = 100


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is trained."""

    name: str
    num_layers: int
    steps: int
    rows: int  # rows of ROW_LENGTH tokens in a step
    learning_rate: float


TARGET = Recipe("tales", num_layers=8, steps=2200, rows=4, learning_rate=2.5e-3)
DRAFT = Recipe("tales-draft", num_layers=1, steps=1200, rows=4, learning_rate=4e-3)


def model_config(recipe: Recipe) -> dict:
    """The model's `config.json`. Target and draft differ in their number of layers only."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "torch_dtype": "float16",
        "use_cache": True,
    }


# --- The text ---------------------------------------------------------------------------------------------------------


def training_story(index: int) -> str:
    """Story number `index` of the training text. Every third comes without its title: prompts will, too."""
    text = story(random.Random(f"training {index}"))
    return text.partition("\n\n")[2] if index % 3 == 0 else text


def held_out_story(index: int) -> str:
    """A story that was not trained on (its seed is another; it has its title)."""
    return story(random.Random(f"held out {index}"))


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model like Llama 2's: BPE, unknown characters as bytes, a newline is the byte 0x0A."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def encode(texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[Tensor, Tensor]:
    """All texts in one row, each between <s> and </s>. Returns token ids (N,) and the index of each text's <s>."""
    ids: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(ids))
        ids += [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
    return torch.tensor(ids), torch.tensor(starts)


def rows_of(ids: Tensor, starts: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that begin with the stories `chosen` (B,). Returns inputs and, one further, targets: (B, S) each."""
    index = starts[chosen, None] + torch.arange(ROW_LENGTH + 1)
    rows = ids[index]
    return rows[:, :-1], rows[:, 1:]


# --- Training ---------------------------------------------------------------------------------------------------------


def batched_attend(rows: int) -> Attend:
    """Causal attention within each of `rows` rows that lie one behind the other. Same shapes as every `attend`."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, S, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    return attend


def batched_logits(model: Llama, inputs: Tensor) -> Tensor:
    """inputs: (B, S). Returns logits (B * S, V)."""
    rows, length = inputs.shape
    positions = torch.arange(length).repeat(rows)
    return model.logits(model(inputs.flatten(), positions, batched_attend(rows)))


def fresh_model(recipe: Recipe) -> Llama:
    """Random weights: normal, 0.02 wide; those that add to the residual stream narrower, the deeper the model."""
    generator = torch.Generator().manual_seed(SEED)
    model = Llama(parse_config(model_config(recipe)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * recipe.num_layers) if adds else 0.02
                weight.normal_(0.0, std, generator=generator)
    return model


def learning_rate(recipe: Recipe, step: int) -> float:
    """A short warm-up, then a straight line down to zero."""
    warm_up = min(1.0, (step + 1) / 100)
    return recipe.learning_rate * warm_up * (1 - step / recipe.steps)


def train(recipe: Recipe, ids: Tensor, starts: Tensor, teacher: Llama | None = None) -> tuple[Llama, list[dict]]:
    """Train one model, from its last checkpoint if there is one. Returns it, and its loss every 20 steps.

    Without a teacher the loss is the surprise at the next token. With one it is the cross-entropy with the teacher's
    distribution over it: what the text does not tell, the teacher does (Hinton et al., "Distilling the Knowledge in
    a Neural Network", 2015).
    """
    model = fresh_model(recipe)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    curve: list[dict] = []
    first = 0
    identity = f"{recipe} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()}"  # of what a checkpoint belongs to
    checkpoint = SCRATCH / f"{recipe.name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["identity"] == identity:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            curve, first = saved["curve"], saved["step"]
            print(f"{recipe.name}: going on from step {first}")

    usable = int((starts + ROW_LENGTH < len(ids)).sum())
    recent: list[float] = []
    began = time.perf_counter()
    for step in range(first, recipe.steps):
        chosen = torch.randint(usable, (recipe.rows,), generator=torch.Generator().manual_seed(SEED + step))
        inputs, targets = rows_of(ids, starts, chosen)
        logits = batched_logits(model, inputs)
        if teacher is None:
            loss = F.cross_entropy(logits, targets.flatten())
        else:
            with torch.no_grad():
                wanted = batched_logits(teacher, inputs).softmax(-1)
            loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()

        recent.append(loss.item())
        done = step + 1
        if done % 20 == 0 or done == recipe.steps:
            curve.append({"step": done, "loss": round(statistics.fmean(recent), 4)})
            recent.clear()
            per_step = (time.perf_counter() - began) / (done - first)
            left = per_step * (recipe.steps - done) / 60
            speed = recipe.rows * ROW_LENGTH / per_step
            print(
                f"{recipe.name}: step {done}/{recipe.steps}  loss {curve[-1]['loss']:.3f}  "
                f"{speed:.0f} tokens/s  {left:.0f} min left",
                flush=True,
            )
        if done % STEPS_BETWEEN_CHECKPOINTS == 0 or done == recipe.steps:
            SCRATCH.mkdir(exist_ok=True)
            state = {"identity": identity, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"curve": curve, "step": done}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return model, curve


# --- What was reached -------------------------------------------------------------------------------------------------


def cached_attend(rows: Tensor) -> Attend:
    """One new token over the keys and values of earlier ones. rows: (S, K, D), standing in for both."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = torch.cat((rows, k)), torch.cat((rows, v))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, enable_gqa=True)[0].transpose(0, 1)

    return attend


@torch.inference_mode()
def measure_step_costs(context: int = 128, repeats: int = 300) -> dict:
    """The cost of decoding one token at `context`, one thread, target and draft in turn. Weights do not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def step_of(recipe: Recipe) -> Callable[[], Tensor]:
        model = fresh_model(recipe)
        config = parse_config(model_config(recipe))
        attend = cached_attend(torch.randn(context, config.num_key_value_heads, config.head_dim))
        token, position = torch.tensor([5]), torch.tensor([context])
        return lambda: model.logits(model(token, position, attend))

    steps = {recipe.name: step_of(recipe) for recipe in (TARGET, DRAFT)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    target, draft = (statistics.median(seconds[recipe.name]) * 1000 for recipe in (TARGET, DRAFT))
    return {
        "context": context,
        "target_step_ms": round(target, 3),
        "draft_step_ms": round(draft, 3),
        "draft_share_of_target": round(draft / target, 3),
    }


@torch.inference_mode()
def measure_agreement(target: Llama, draft: Llama, tokenizer: sentencepiece.SentencePieceProcessor) -> dict:
    """On 64 held-out stories: both perplexities, and how often both models' likeliest next token is the same."""
    surprise = {TARGET.name: 0.0, DRAFT.name: 0.0}
    same = total = 0
    for index in range(64):
        ids = torch.tensor([tokenizer.bos_id(), *tokenizer.encode(held_out_story(index)), tokenizer.eos_id()])
        inputs, targets = ids[None, :-1], ids[1:]
        logits = {TARGET.name: batched_logits(target, inputs), DRAFT.name: batched_logits(draft, inputs)}
        for name, rows in logits.items():
            surprise[name] += F.cross_entropy(rows, targets, reduction="sum").item()
        same += int((logits[TARGET.name].argmax(-1) == logits[DRAFT.name].argmax(-1)).sum())
        total += len(targets)
    return {
        "held_out_tokens": total,
        "target_perplexity": round(math.exp(surprise[TARGET.name] / total), 3),
        "draft_perplexity": round(math.exp(surprise[DRAFT.name] / total), 3),
        "greedy_agreement": round(same / total, 3),
    }


# --- What is written --------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_model(recipe: Recipe, model: Llama, tokenizer: bytes, curve: list[dict]) -> Llama:
    """Write a checkpoint folder, weights in float16. Returns the model as a reader will find it: rounded."""
    folder = MODELS / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters, not the state dict: there the tied head would stand a second time.
    weights = {name: weight.detach().to(torch.float16) for name, weight in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", model_config(recipe))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": model_config(recipe)["max_position_embeddings"],
        },
    )
    (folder / "tokenizer.model").write_bytes(tokenizer)
    write_json(folder / "loss.json", curve)
    plot_loss(folder / "loss.svg", recipe, curve)
    return rounded(model, weights)


def rounded(model: Llama, weights: dict[str, Tensor]) -> Llama:
    """`model`, with its parameters replaced by these float16 ones, in float32."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return model


def plot_loss(path: Path, recipe: Recipe, curve: list[dict]) -> None:
    """The loss over the steps, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = recipe.name  # else every run would write other ids
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([point["step"] for point in curve], [point["loss"] for point in curve], color="tab:blue", linewidth=1)
    axes.set(xlabel="step", ylabel="nats per token", title=f"{recipe.name}: training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def measure() -> None:
    """Measure the committed models, and write it beside the draft."""
    target, draft = (
        rounded(fresh_model(recipe), load_file(MODELS / recipe.name / "model.safetensors"))
        for recipe in (TARGET, DRAFT)
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(MODELS / TARGET.name / "tokenizer.model"))
    measured = {
        "command": f"{COMMAND} --measure",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread",
        "decode_step": measure_step_costs(),
        "held_out": measure_agreement(target, draft, tokenizer),
    }
    write_json(MODELS / DRAFT.name / "measurements.json", measured)
    print(json.dumps(measured, indent=2))


@click.command()
@click.option("--threads", default=2, show_default=True, help="CPU threads")
@click.option("--measure", "only_measure", is_flag=True, help="train nothing: measure the models that are there")
def main(threads: int, only_measure: bool) -> None:
    """Train tales and tales-draft into common/models/."""
    torch.set_num_threads(threads)
    if only_measure:
        return measure()

    costs = measure_step_costs()
    print(f"One decode step: {costs}")
    if costs["draft_share_of_target"] > 0.2:
        raise SystemExit("The draft's step costs more than a fifth of the target's: give it fewer or smaller layers.")

    print(f"Writing {NUM_STORIES} stories ...", flush=True)
    texts = [training_story(index) for index in range(NUM_STORIES)]
    tokenizer_bytes = train_tokenizer(texts[:4000])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    ids, starts = encode(texts, tokenizer)
    print(f"{len(ids)} tokens, {len(ids) / len(texts):.0f} a story", flush=True)

    target, curve = train(TARGET, ids, starts)
    target = write_model(TARGET, target, tokenizer_bytes, curve)
    draft, curve = train(DRAFT, ids, starts, teacher=target)
    write_model(DRAFT, draft, tokenizer_bytes, curve)
    measure()


if __name__ == "__main__":
    main()
