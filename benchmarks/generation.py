"""How fast is pvtblip's `generate`, compared with transformers' on the same weights and image tokens?

    python benchmarks/generation.py [--quick] [--json FILE]

Both run in this process, in turn, several times; the ratio is the median of (transformers' time / ours).
Both get image tokens, so the encoder is not timed. transformers runs at its best: scaled dot-product attention
and a fresh `EncoderDecoderCache` per call; ours is packed once, as `load_model` does it, and the time of
that is printed apart.
The tokens of both must be the same up to [SEP]. A warm-up call of each is not timed. The floor is the
time that the least work would take: for each step the bytes of weights and caches over this
machine's bandwidth, or its multiplications over the machine's matrix rate, whichever is more; both rates
are measured first. `of floor` is floor / ours.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import BertConfig, BertLMHeadModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pvtblip.demo import fast_precision
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.fast import pack
from pvtblip.generation import generate

MODELS = {  # name: (decoder sizes, image tokens)
    '6 layers of 384, 49 image tokens': (
        dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        49,
    ),
    '12 layers of 768, 144 image tokens': (dict(), 144),
}
MAX_LENGTH = 20  # positions, the 4 of the prompt included


def build(sizes, num_tokens, batch, device, seed=0):
    "The same random weights in both libraries, and image tokens (B, S, D)."
    torch.manual_seed(seed)
    config = DecoderConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = BertLMHeadModel(
        BertConfig(**asdict(config), is_decoder=True, add_cross_attention=True, attn_implementation='sdpa')
    )
    for weight in theirs.parameters():
        # further apart than at the start: captions differ from image to image
        weight.data += torch.randn_like(weight) * 0.03
    ours = Captioner(CaptionerConfig.tiny(decoder=config))
    ours.decoder.load_state_dict(
        {k: v for k, v in theirs.state_dict().items() if not k.startswith('cls.predictions.decoder')}
    )
    images = torch.randn(batch, num_tokens, config.hidden_size)
    return ours.eval().to(device), theirs.eval().to(device), images.to(device)


def shift_end(ours, theirs, by):
    "Make [SEP] likelier or rarer in both."
    sep = ours.tokenizer.sep_token_id
    for bias in {
        b.data_ptr(): b
        for b in (
            ours.decoder.cls.predictions.bias,
            theirs.cls.predictions.bias,
            theirs.cls.predictions.decoder.bias,
        )
    }.values():
        bias.data[sep] += by


@torch.inference_mode()
def end_gap(ours, images, share=0.1):
    "What [SEP]'s logit lacks to be the largest at this share of the steps."
    ids = generate(ours, image_tokens=images, min_length=MAX_LENGTH, max_length=MAX_LENGTH).sequences[:, 0]
    logits = ours.decoder(ids, images)[:, ours.tokenizer.prompt_length - 1 : -1].float()  # (B, T-P, V)
    return float((logits.amax(-1) - logits[..., ours.tokenizer.sep_token_id]).flatten().quantile(share))


def best_seconds(function, device, rounds=7):
    "The shortest of several runs."
    function()
    return min(timed(function, device)[1] for _ in range(rounds))


def machine(dtype, device):
    "Bytes a second that are read, and floating-point operations a second of a large matrix product."
    # 268 MB: no cache holds it
    block, matrix = (torch.ones(2**26, device=device), torch.ones(2048, 2048, dtype=dtype, device=device))
    return 4 * 2**26 / best_seconds(block.sum, device), 2 * 2048**3 / best_seconds(
        lambda: matrix @ matrix, device
    )


def least_seconds(config, image_tokens, lengths, beams, prompt, dtype, rates):
    """What the least work takes: lengths are the generated tokens of each image; a step's work is bound by
    memory or by multiplications.
    """
    D, layers, size = config.hidden_size, config.num_hidden_layers, dtype.itemsize
    # self 4 D^2, cross-attention's query and output 2 D^2
    layer, head = (6 * D * D + 2 * D * config.intermediate_size, D * D + config.vocab_size * D)
    keys = len(lengths) * image_tokens * layers * 2 * D  # of the images, computed once
    seconds = max((layers * 2 * D * D + keys) * size / rates[0], 2 * keys * D / rates[1])
    for step in range(max(lengths)):
        images = sum(length > step for length in lengths)
        rows = images * (beams if step else 1)
        new = 1 if step else prompt
        past = prompt + step
        caches = (images * image_tokens + rows * past) * layers * 2 * D
        operations = 2 * rows * (new * layers * layer + head) + 4 * D * layers * rows * new * (
            image_tokens + past
        )
        seconds += max((layers * layer + head + caches) * size / rates[0], operations / rates[1])
    return seconds


def call_ours(model, images, beams):
    return generate(model, image_tokens=images, num_beams=beams, max_length=MAX_LENGTH).sequences[:, 0]


@torch.inference_mode()
def call_theirs(model, prompt, images, beams, sep):
    return model.generate(
        input_ids=prompt,
        encoder_hidden_states=images,
        num_beams=beams,
        max_length=MAX_LENGTH,
        do_sample=False,
        eos_token_id=sep,
        pad_token_id=0,
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )


def until_end(ids, sep):
    """Rows as lists that stop at the first [SEP]: what stands behind it is padding, which the two write
    differently.
    """
    return [row[: row.index(sep) + 1] if sep in row else row for row in ids.tolist()]


def timed(function, device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure(ours, theirs, images, beams, rounds, rates):
    "One row of the table: both called in turn, `rounds` times, after a warm-up."
    sep, device = ours.tokenizer.sep_token_id, images.device
    prompt = ours.tokenizer(batch_size=len(images))['input_ids'].to(device)
    pair = lambda: call_ours(ours, images, beams), lambda: call_theirs(theirs, prompt, images, beams, sep)
    a, b = (until_end(f(), sep) for f in pair)
    times = []
    for i in range(rounds):
        mine, other = (timed(f, device)[1] for f in (pair if i % 2 == 0 else pair[::-1]))
        times.append((mine, other) if i % 2 == 0 else (other, mine))
    lengths = [len(row) - prompt.shape[1] for row in a]
    ms = 1e3 * statistics.median(x for x, _ in times)
    floor = 1e3 * least_seconds(
        ours.config.decoder, images.shape[1], lengths, beams, prompt.shape[1], images.dtype, rates
    )
    return dict(
        ratio=round(statistics.median(y / x for x, y in times), 2),
        ms=round(ms, 1),
        floor_ms=round(floor, 1),
        of_floor=round(floor / ms, 2),
        same_tokens=a == b,
        tokens=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='no batch of 32, fewer rounds: three or four minutes on one core, without it about half an hour',
    )
    parser.add_argument('--json', metavar='FILE', help='write the rows here too')
    parser.add_argument('--rounds', type=int, help='timed calls of each (default 5; 3 with --quick)')
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rounds = args.rounds or (3 if args.quick else 5)
    batches = (1, 8) if args.quick else (1, 8, 32)
    rows = []
    print(
        f'{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; ratio: '
        f"transformers' time / ours, median of {rounds}"
    )
    rates = {
        dtype: machine(dtype, device)
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (fast_precision() == 'bf16')]
    }
    for dtype, (read, multiplied) in rates.items():
        print(
            f'{str(dtype).removeprefix("torch.")}: {read / 1e9:.1f} GB/s read, '
            f'{multiplied / 1e9:,.0f} GFLOP/s'
        )
    print(
        f'{"model":36}{"ending":>8}{"dtype":>10}{"batch":>6}{"beams":>6}{"ratio":>7}{"ms":>9}'
        f'{"floor":>8}{"of floor":>9}{"tokens":>8} '
        ' lengths  same tokens'
    )
    for name, (sizes, num_tokens) in MODELS.items():
        ours, theirs, images = build(sizes, num_tokens, max(batches), device)
        gap = end_gap(ours, images)
        for ending, shift in (('varied', gap), ('full', -1e4)):
            shift_end(ours, theirs, shift)
            for dtype in rates:
                theirs = theirs.to(dtype)
                images = images.to(dtype)
                packed, seconds = timed(lambda: pack(copy.deepcopy(ours).to(dtype)), device)
                print(f'{name}, {dtype}: copied and packed in {1e3 * seconds:.0f} ms')
                for batch in batches:
                    for beams in (1, 3, 5):
                        row = dict(
                            model=name,
                            ending=ending,
                            dtype=str(dtype).removeprefix('torch.'),
                            batch=batch,
                            beams=beams,
                            **measure(packed, theirs, images[:batch], beams, rounds, rates[dtype]),
                        )
                        rows.append(row)
                        if args.json:
                            # after each row: a run that is stopped keeps what it has
                            Path(args.json).write_text(json.dumps(rows, indent=1))
                        print(
                            f'{name:36}{ending:>8}{row["dtype"]:>10}{batch:6}{beams:6}'
                            f'{row["ratio"]:7.2f}{row["ms"]:9.1f}{row["floor_ms"]:8.1f}'
                            f'{row["of_floor"]:9.0%}{row["tokens"]:8}'
                            f'  {row["shortest"]:>3}-{row["longest"]:<3}  {row["same_tokens"]}',
                            flush=True,
                        )
    ratios = [row['ratio'] for row in rows]
    print(
        f'smallest ratio {min(ratios)}, median {statistics.median(ratios):.2f}; same tokens in '
        f'{sum(r["same_tokens"] for r in rows)} of {len(rows)}'
    )


if __name__ == '__main__':
    main()
