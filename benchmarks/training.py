"""How fast is a training step of pvtblip, and how much memory does it take, compared with the plain way
on the same weights, images and captions?

    python benchmarks/training.py [--quick] [--flickr DIR] [--json FILE]

The plain way: transformers' `BertLMHeadModel` with cross-attention behind the same image encoder. A row
of its batch is an image
and a caption (so an image with five captions is encoded five times), padded to 77 positions; logits
everywhere, the loss is the library's own.
It is timed in float32 (a) and in bfloat16 (b), where the processor multiplies bfloat16; ours is timed in
the faster of the two, as `pvtblip train` chooses it.
Each way runs in a process of its own, so that its peak memory is its own: the process's peak, less what
it had before the model was made. They step in turn,
several times; the ratios are those of the medians. All do forward, backward and AdamW on the same batch.
In float32 ours and plain must give the same loss (dropout 0) within 1e-3, in bfloat16 within 3e-2; else
the script ends with an error.
--flickr takes a folder with images/ and captions.json, {file: [five captions]}; without it the images
are drawn scenes.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertConfig, BertLMHeadModel

from pvtblip.demo import fast_precision
from pvtblip.data import read_captions
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.shapes import make_scene

CAPTIONS = 5  # per image
PADDED = 77  # positions of a row in the plain way, CLIP's custom
TOLERANCE = dict(float32=1e-3, bfloat16=3e-2)
TINY = EncoderConfig.tiny()
MODELS = dict(  # encoder, decoder width, layers, images a step on a CPU
    small=(TINY, 256, 4, 16),
    middle=(EncoderConfig('pvt_v2_b0'), 384, 6, 4),
    large=(EncoderConfig('pvt_v2_b0'), 768, 12, 8),
)


class Plain(torch.nn.Module):
    "An image and a caption per row, logits everywhere."

    def __init__(self, ours):
        super().__init__()
        self.encoder = copy.deepcopy(ours.encoder)
        self.decoder = BertLMHeadModel(
            BertConfig(
                **asdict(ours.config.decoder),
                is_decoder=True,
                add_cross_attention=True,
                attn_implementation='sdpa',
            )
        )
        self.decoder.load_state_dict(ours.decoder.state_dict(), strict=False)
        self.decoder.tie_weights()
        self.decoder.cls.predictions.decoder.bias.data.copy_(ours.decoder.cls['predictions'].bias.data)
        self.decoder.loss_type = 'ForCausalLM'

    def forward(self, pixel_values, input_ids, attention_mask, labels):
        return self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.encoder(pixel_values),
            labels=labels,
        ).loss


def examples(encoder, images, flickr):
    "Pixels (images, 3, H, W), and for each image five captions."
    transform = image_transform(encoder)
    if flickr:
        records = [
            record for record in read_captions(flickr / 'captions.json') if len(record.captions) == CAPTIONS
        ][:images]
        return torch.stack([transform(flickr / 'images' / record.file) for record in records]), [
            list(record.captions) for record in records
        ]
    scenes = [make_scene(0, i, image_size=encoder.image_size) for i in range(images)]
    return torch.stack([transform(Image.fromarray(scene.image)) for scene in scenes]), [
        list(scene.captions) for scene in scenes
    ]


def build(way, size, flickr, device):
    "A model and what it is fed; the same weights, images and captions for each way."
    encoder, width, layers, images = MODELS[size]
    torch.manual_seed(0)
    decoder = DecoderConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = Captioner(CaptionerConfig(encoder=encoder, decoder=decoder))
    pixels, captions = examples(encoder, images * (8 if device.type == 'cuda' else 1), flickr)
    rows = model.tokenizer([caption for each in captions for caption in each])
    if way == 'ours':
        inputs = pixels, rows['input_ids'], rows['labels']
    else:
        model = Plain(model)
        padded = {
            k: F.pad(v, (0, PADDED - v.shape[1]), value=-100 if k == 'labels' else 0) for k, v in rows.items()
        }
        inputs = pixels.repeat_interleave(CAPTIONS, 0), *padded.values()
    return model.to(device).train(), [x.to(device) for x in inputs], len(pixels)


def peak(device):
    "Bytes: on a GPU the most that tensors took, else the most that the process had in memory."
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def make_step(model, inputs, dtype, device):
    "A function that trains one step and returns its loss."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(*inputs)
        loss = getattr(out, 'loss', out)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for a GPU

    return step


def work(way, dtype, size, flickr):
    """One way of training, in this process: says its first loss, then does a step for each line that it is
    sent and says the seconds; at the end its peak memory.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    before = peak(device)
    model, inputs, images = build(way, size, flickr, device)
    step = make_step(model, inputs, getattr(torch, dtype), device)
    # the first step is the warm-up, and has untrained weights
    print(json.dumps(dict(loss=step(), images=images)), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
    print(peak(device) - before)


class Worker:
    "`work` in a process of its own, one step at a time."

    def __init__(self, way, dtype, size, flickr):
        command = [
            sys.executable,
            __file__,
            '--one',
            way,
            dtype,
            size,
            *(['--flickr', str(flickr)] if flickr else []),
        ]
        self.name = f'{way} {dtype} {size}'
        self.seconds = []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.found = json.loads(self.line())

    def line(self):
        return self.process.stdout.readline() or sys.exit(
            f'{self.name} ended with exit code {self.process.wait()}'
        )

    def step(self):
        print(file=self.process.stdin, flush=True)
        self.seconds.append(float(self.line()))

    def result(self):
        self.process.stdin.close()
        found = self.found | dict(seconds=statistics.median(self.seconds), memory=int(self.line()))
        self.process.wait()
        return found


def compare(size, rounds, flickr, fast):
    "One row of the table; ends the script where the losses differ."
    workers = {
        (way, dtype): Worker(way, dtype, size, flickr)
        for way in ('ours', 'plain')
        for dtype in {'float32': 1, fast: 1}
    }
    for i in range(rounds):  # in turn, so that a busy moment hits all of them
        for worker in list(workers.values())[:: 1 if i % 2 else -1]:
            worker.step()
    ways = {name: worker.result() for name, worker in workers.items()}
    for dtype in {'float32': 1, fast: 1}:
        ours, plain = ways['ours', dtype], ways['plain', dtype]
        if abs(ours['loss'] - plain['loss']) > TOLERANCE[dtype]:
            sys.exit(
                f'the losses differ in {dtype}: {ours["loss"]:.5f} ours, {plain["loss"]:.5f} plain; '
                'the two do not compute the same'
            )
    ours, a, b = ways['ours', fast], ways['plain', 'float32'], ways['plain', fast]
    encoder, width, layers, _ = MODELS[size]
    return dict(
        data='flickr' if flickr else 'shapes',
        encoder='tiny PVT' if encoder is TINY else encoder.name,
        image_size=encoder.image_size,
        images=ours['images'],
        captions_per_image=CAPTIONS,
        width=width,
        layers=layers,
        dtype=fast,
        captions_per_second=round(ours['images'] * CAPTIONS / ours['seconds'], 1),
        faster_than_a=round(a['seconds'] / ours['seconds'], 2),
        faster_than_b=round(b['seconds'] / ours['seconds'], 2),
        memory_mb=round(ours['memory'] / 1e6),
        share_of_memory_a=round(ours['memory'] / a['memory'], 2),
        loss_ours=ours['loss'],
        loss_a=a['loss'],
        ways={' '.join(way): found for way, found in ways.items()},
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--quick', action='store_true', help='the small model only, 3 rounds: two minutes on two cores'
    )
    parser.add_argument(
        '--flickr',
        metavar='DIR',
        type=Path,
        help='photos instead of drawn scenes: a folder with images/ and captions.json',
    )
    parser.add_argument('--json', metavar='FILE', help='write the rows here too')
    parser.add_argument('--rounds', type=int, help='timed steps of each (default 7; 3 with --quick)')
    parser.add_argument('--one', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.flickr and not (args.flickr / 'captions.json').is_file():
        sys.exit(
            f'{args.flickr / "captions.json"}: no such file; --flickr takes a folder with images/ and '
            'captions.json'
        )
    if args.one:
        return work(*args.one, args.flickr)
    rounds = args.rounds or (3 if args.quick else 7)
    fast = 'bfloat16' if fast_precision() == 'bf16' else 'float32'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(
        f'{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; ours in {fast} '
        f'against the plain way in float32 (a) and in {fast} (b), medians of {rounds}'
        + ('' if fast == 'bfloat16' else '; no bfloat16: this processor only emulates it')
    )
    print(
        f'{"data":>8}{"encoder":>12}{"px":>5}{"images":>8}{"width":>7}{"layers":>8}{"captions/s":>12}'
        f'{"x (a)":>8}{"x (b)":>8}{"memory MB":>11}{"of (a)":>8}{"loss ours":>11}{"(a)":>9}'
    )
    rows = []
    for size in list(MODELS)[: 1 if args.quick else None]:
        row = compare(size, rounds, args.flickr, fast)
        rows.append(row)
        print(
            f'{row["data"]:>8}{row["encoder"]:>12}{row["image_size"]:>5}{row["images"]:>8}'
            f'{row["width"]:>7}{row["layers"]:>8}{row["captions_per_second"]:>12.1f}'
            f'{row["faster_than_a"]:>8.2f}{row["faster_than_b"]:>8.2f}{row["memory_mb"]:>11}'
            f'{row["share_of_memory_a"]:>8.2f}{row["loss_ours"]:>11.4f}{row["loss_a"]:>9.4f}',
            flush=True,
        )
    print(
        f'smallest: {min(row["faster_than_a"] for row in rows)} times as fast as (a), '
        f'{min(row["faster_than_b"] for row in rows)} times as fast as (b); '
        f"largest share of (a)'s memory: {max(row['share_of_memory_a'] for row in rows)}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
