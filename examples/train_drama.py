#!/usr/bin/env python3
"""Train the example model: a small Llama that writes English drama.

Reads one public-domain text of plays (speaker names, line breaks, blank lines between speeches)
and writes a Hugging Face model directory of less than 8 MB: a byte-level BPE tokenizer, a Llama
decoder of about 3.5 million parameters in bfloat16, and a model card with the figures measured on
the way. The defaults are the recipe of ``examples/drama-3m``::

    python examples/train_drama.py --text tinyshakespeare.txt --output examples/drama-3m

The text is small, so the training regularises: dropout on the embeddings and on the output of
every attention and MLP block (by forward hooks that are taken off before saving, so the result is
a plain Llama), BPE-dropout (https://arxiv.org/abs/1910.13267: the same text cut into tokens in
several ways), weight decay, and the weights of the best validation loss are the ones kept.
Ctrl-C ends the training early and saves the best weights so far.
"""

import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SIZE_LIMIT = 8_000_000  # bytes, of the whole output directory
TOKENIZATIONS = 16  # BPE-dropout: how many ways the training text is cut into tokens
OPENING_SHARE = 0.125  # of the training windows: begin with END_OF_TEXT and a speaker's name
IGNORED = -100  # label of a position that is not scored
TEMPERATURE = 0.8  # of the samples
PROMPTS = ("ROMEO:\n", "First Citizen:\n", "KING RICHARD III:\n")


def _setting(default: int | float, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights; each field is a command-line option."""

    vocab_size: int = _setting(1024, "Tokens, the 256 bytes and <|endoftext|> included.")
    hidden_size: int = _setting(256, "Width of the residual stream.")
    layers: int = _setting(5, "Decoder layers.")
    heads: int = _setting(8, "Query heads.")
    kv_heads: int = _setting(2, "Key and value heads.")
    intermediate_size: int = _setting(640, "Width of the gated MLP.")
    context: int = _setting(1024, "Tokens the model sees at once.")
    steps: int = _setting(1500, "Optimizer steps.")
    batch_size: int = _setting(8, "Windows of --context tokens in a step.")
    learning_rate: float = _setting(3e-3, "Peak learning rate.")
    warmup_steps: int = _setting(100, "Steps of linear warm-up before the cosine decay.")
    weight_decay: float = _setting(0.1, "AdamW weight decay of the matrices.")
    dropout: float = _setting(0.2, "Dropout on embeddings and on attention and MLP outputs.")
    attention_dropout: float = _setting(0.1, "Dropout on attention weights.")
    bpe_dropout: float = _setting(0.1, "Probability of skipping a BPE merge in training text.")
    validation_share: float = _setting(0.1, "Share of the text, its end, held out.")
    evaluate_every: int = _setting(50, "Steps between validations.")
    seed: int = _setting(0, "Seed of initialisation, batches and dropout.")


@dataclass(frozen=True)
class Score:
    """Loss on a held-out text."""

    nats_per_token: float
    bits_per_character: float

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats/token, {self.bits_per_character:.4f} bits/character"


def split_text(text: str, validation_share: float) -> tuple[str, str]:
    """Cut the text in two (training, validation) where a speech begins."""
    cut = text.find("\n\n", int(len(text) * (1 - validation_share))) + 2
    if cut < 2 or cut >= len(text):
        raise click.ClickException("the text has no blank line near the start of its held-out end")
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: no normalisation and no unknown token, so it is lossless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise click.ClickException(
            f"the text yields {tokenizer.get_vocab_size()} tokens, --vocab-size is {vocab_size}"
        )
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, context: int, output: Path) -> None:
    """Write the three files from which AutoTokenizer makes a PreTrainedTokenizerFast."""
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    tokenizer.save(str(output / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Windows:
    """Random training windows out of one stream of tokens.

    With BPE-dropout the stream holds the text ``TOKENIZATIONS`` times, each time cut differently.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, recipe: Recipe, device: torch.device):
        copies = 1
        if recipe.bpe_dropout > 0:
            copies = TOKENIZATIONS
            tokenizer.model.dropout = recipe.bpe_dropout
        encodings = tokenizer.encode_batch_fast([END_OF_TEXT + text] * copies)
        tokenizer.model.dropout = None
        stream = torch.tensor([token for encoding in encodings for token in encoding.ids])
        newline = stream.eq(tokenizer.token_to_id("Ċ"))  # the byte-level alphabet's line feed
        speech = newline[:-2] & newline[1:-1] & ~newline[2:]
        openings = speech.nonzero().flatten() + 1  # the newline just before a speaker's name
        self.length = recipe.context + 1
        self.stream = stream.to(device)
        self.openings = openings[openings <= len(stream) - self.length].to(device)
        self.offsets = torch.arange(self.length, device=device)

    def draw(self, count: int) -> Tensor:
        """Return token ids [count, context + 1].

        Most windows begin anywhere, so that the model needs no first token to start from; in some
        END_OF_TEXT stands before a speech, so that it can also start from that alone.
        """
        device = self.stream.device
        anywhere = torch.randint(len(self.stream) - self.length, (count,), device=device)
        opening = self.openings[torch.randint(len(self.openings), (count,), device=device)]
        opens = torch.rand(count, device=device) < OPENING_SHARE
        tokens = self.stream[torch.where(opens, opening, anywhere)[:, None] + self.offsets]
        tokens[:, 0] = torch.where(opens, END_OF_TEXT_ID, tokens[:, 0])
        return tokens


class HeldOut:
    """Overlapping windows that score each token of a text once.

    A window moves on by half of the context, and its second half is scored (of the first window,
    all), so every token past the first half has at least half of the context before it.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, context: int, device: torch.device):
        tokens = torch.tensor([END_OF_TEXT_ID, *tokenizer.encode(text).ids])
        self.characters = len(text)
        self.tokens = len(tokens) - 1
        stride = context // 2
        inputs, labels = [], []
        for start in range(0, max(1, self.tokens - stride), stride):
            window = tokens[start : start + context + 1]
            target = window[1:].clone()
            if start > 0:
                target[: context - stride] = IGNORED
            missing = context - len(target)
            inputs.append(F.pad(window[:-1], (0, missing), value=END_OF_TEXT_ID))
            labels.append(F.pad(target, (0, missing), value=IGNORED))
        self.inputs = torch.stack(inputs).to(device)
        self.labels = torch.stack(labels).to(device)
        assert int((self.labels != IGNORED).sum()) == self.tokens

    @torch.no_grad()
    def score(self, model: nn.Module, batch_size: int) -> Score:
        """Score the model in evaluation mode; the mode it was in is restored."""
        training = model.training
        model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=self.inputs.device)
        batches = zip(self.inputs.split(batch_size), self.labels.split(batch_size), strict=True)
        for inputs, labels in batches:
            nats += cross_entropy(model, inputs, labels, reduction="sum")
        model.train(training)
        total = nats.item()
        return Score(total / self.tokens, total / math.log(2) / self.characters)


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Cross entropy in nats; float32, from logits in bfloat16 where the device is a GPU."""
    on_gpu = inputs.device.type == "cuda"
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=on_gpu):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def create_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a randomly initialised Llama with tied embeddings, in float32."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_dropout=recipe.attention_dropout,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        # Not the pad token: torch would freeze its embedding, and END_OF_TEXT is to be learnt.
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, probability: float) -> list[RemovableHandle]:
    """Drop from the embeddings and from what each block adds to the residual stream."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention: (output, weights)
            return F.dropout(output[0], probability, module.training), *output[1:]
        return F.dropout(output, probability, module.training)

    modules: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn, layer.mlp]
    return [module.register_forward_hook(drop) for module in modules]


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.02."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Training:
    """What a training run came to."""

    best_step: int
    steps: int
    train_tokens: int
    seconds: float


def train(model: LlamaForCausalLM, windows: Windows, held_out: HeldOut, recipe: Recipe) -> Training:
    """Train in place and leave the weights of the best validation loss in the model."""
    optimizer = create_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(learning_rate_factor, recipe=recipe)
    )
    hooks = add_dropout(model, recipe.dropout)
    best, best_step, best_weights = math.inf, 0, model.state_dict()
    started, step = time.perf_counter(), 0
    model.train()
    try:
        while step < recipe.steps:
            tokens = windows.draw(recipe.batch_size)
            loss = cross_entropy(model, tokens[:, :-1], tokens[:, 1:], reduction="mean")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % recipe.evaluate_every and step != recipe.steps:
                continue
            score = held_out.score(model, recipe.batch_size)
            click.echo(
                f"step {step:5}  {time.perf_counter() - started:6.1f} s  "
                f"train {loss.item():.4f}  validation {score}"
            )
            if score.nats_per_token < best:
                best, best_step = score.nats_per_token, step
                best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    except KeyboardInterrupt:
        click.echo(f"stopped at step {step}; the best weights are from step {best_step}")
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_weights)
    return Training(
        best_step=best_step,
        steps=step,
        train_tokens=step * recipe.batch_size * recipe.context,
        seconds=time.perf_counter() - started,
    )


def save_model(model: LlamaForCausalLM, output: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bfloat16."""
    model.config.attention_dropout = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model.to(torch.bfloat16).save_pretrained(output)


def write_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[str]:
    """Sample 160 tokens after each prompt."""
    torch.manual_seed(seed)
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(
            **inputs, max_new_tokens=160, do_sample=True, temperature=TEMPERATURE
        )
        samples.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return samples


MODEL_CARD = """\
# {name}

A Llama-architecture decoder of {parameters:,} parameters that writes English drama. It is an
example for trying tools on, small enough to travel with them, and good for nothing else.

| | |
|---|---|
| layers, width, MLP width | {r.layers}, {r.hidden_size}, {r.intermediate_size} |
| query heads, kv heads, head size | {r.heads}, {r.kv_heads}, {head_dim} |
| context | {r.context} tokens |
| vocabulary | {r.vocab_size}, byte-level BPE (lossless on any UTF-8), embeddings tied |
| weights | bfloat16, {weight_bytes:,} bytes |

## Training

Made by llmforge's `examples/train_drama.py` from {text_name} ({characters:,} characters),
whose last {held_out_characters:,} characters ({held_out_tokens:,} tokens) were held out: neither
the tokenizer nor the weights were fitted to them, but the step whose weights were kept was chosen
by them, so the validation figures are slightly flattered.

| | |
|---|---|
| steps | {t.steps:,} of {batch_tokens:,} tokens, {t.train_tokens:,} tokens in all |
| weights kept | of step {t.best_step:,}, the best validation loss |
| optimizer | AdamW, peak learning rate {r.learning_rate:g}, weight decay {r.weight_decay:g} |
| dropout | residual {r.dropout:g}, attention {r.attention_dropout:g}, BPE {r.bpe_dropout:g} |
| seed | {r.seed} |
| trained on | {device}, torch {torch_version}, {t.seconds:.0f} s |

## Measured

On the held-out text, with the saved bfloat16 weights:

| | |
|---|---|
| validation loss | {score.nats_per_token:.4f} nats per token |
| | {score.bits_per_character:.4f} bits per character |

The model needs no first token: start from any text, a speaker's name for example, or from
`<|endoftext|>` alone, which opens a new speech. It was not taught to end, so it writes until it is
stopped. Greedy decoding tends to repeat itself; sample at a temperature of about 0.8.

## Samples

At temperature {temperature:g}, with nothing picked out:

{samples}
"""


def directory_size(directory: Path) -> int:
    """Bytes of all files under the directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def recipe_options(command: Any) -> Any:
    """Give the command one option for each field of Recipe."""
    for setting in reversed(dataclasses.fields(Recipe)):
        option = click.option(
            "--" + setting.name.replace("_", "-"),
            default=setting.default,
            type=type(setting.default),
            show_default=True,
            help=setting.metadata["help"],
        )
        command = option(command)
    return command


@click.command(help=(__doc__ or "").splitlines()[0], context_settings={"max_content_width": 100})
@click.option(
    "--text",
    "text_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The plays, UTF-8.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Model directory to write.",
)
@click.option("--device", "device_name", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@recipe_options
def main(text_path: Path, output: Path, device_name: str, **settings: Any) -> None:
    recipe = Recipe(**settings)
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name)
    torch.manual_seed(recipe.seed)

    text = text_path.read_text(encoding="utf-8")
    train_text, held_out_text = split_text(text, recipe.validation_share)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size)
    windows = Windows(tokenizer, train_text, recipe, device)
    held_out = HeldOut(tokenizer, held_out_text, recipe.context, device)
    model = create_model(recipe).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{parameters:,} parameters; held out: {held_out.tokens:,} tokens")
    training = train(model, windows, held_out, recipe)

    output.mkdir(parents=True, exist_ok=True)
    save_model(model, output)
    save_tokenizer(tokenizer, recipe.context, output)

    # What is measured from here on is what was saved.
    saved = AutoModelForCausalLM.from_pretrained(output, dtype="auto").to(device)
    score = held_out.score(saved, recipe.batch_size)
    samples = write_samples(saved, AutoTokenizer.from_pretrained(output), recipe.seed)
    card = MODEL_CARD.format(
        name=output.resolve().name,
        parameters=parameters,
        r=recipe,
        t=training,
        head_dim=recipe.hidden_size // recipe.heads,
        weight_bytes=(output / "model.safetensors").stat().st_size,
        text_name=text_path.name,
        characters=len(text),
        held_out_characters=held_out.characters,
        held_out_tokens=held_out.tokens,
        batch_tokens=recipe.batch_size * recipe.context,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch_version=torch.__version__,
        score=score,
        temperature=TEMPERATURE,
        samples="\n\n".join(f"```text\n{sample}\n```" for sample in samples),
    )
    (output / "README.md").write_text(card, encoding="utf-8")

    click.echo(f"validation, saved weights: {score}")
    for sample in samples:
        click.echo(f"\n{'-' * 72}\n{sample}")
    size = directory_size(output)
    if size > SIZE_LIMIT:
        raise click.ClickException(f"{output} has {size:,} bytes, the limit is {SIZE_LIMIT:,}")
    click.echo(f"\nwrote {output}: {size:,} bytes")


if __name__ == "__main__":
    main()
