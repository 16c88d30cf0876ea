"""How fast is a training step of pvtblip, compared with the plain way on the same weights, images and captions?

    python benchmarks/training.py [--quick] [--json FILE]

The plain way: transformers' `BertLMHeadModel` with cross-attention behind the same image encoder. A row of its batch is an image
and a caption (so an image with five captions is encoded five times), padded to 77 positions; logits everywhere, the loss is the library's own.
Both do forward, backward and AdamW in this process, in turn, several times; the ratio is the median of (plain time / our time).
Before they are timed, both must give the same loss (dropout 0) within 1e-3; else the script ends with an error.
"""
import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertConfig, BertLMHeadModel

from pvtblip.app import fast_precision
from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.pvt_encoder import EncoderConfig, image_transform
from pvtblip.shapes import make_scene

CAPTIONS = 5   # per image
PADDED = 77    # positions of a row in the plain way, CLIP's custom
TOLERANCE = 1e-3
MODELS = [  # encoder, decoder width, layers, images a step on a CPU, in the quick run
    (EncoderConfig.tiny(), 256, 4, 16, True),
    (EncoderConfig("pvt_v2_b0"), 384, 6, 4, False),
    (EncoderConfig("pvt_v2_b0"), 768, 12, 2, False)]


class Plain(torch.nn.Module):
    "An image and a caption per row, logits everywhere."
    def __init__(self, ours):
        super().__init__()
        self.encoder = copy.deepcopy(ours.encoder)
        self.decoder = BertLMHeadModel(BertConfig(**asdict(ours.config.decoder), is_decoder=True, add_cross_attention=True, attn_implementation="sdpa"))
        self.decoder.load_state_dict(ours.decoder.state_dict(), strict=False)
        self.decoder.tie_weights()
        self.decoder.cls.predictions.decoder.bias.data.copy_(ours.decoder.cls["predictions"].bias.data)
        self.decoder.loss_type = "ForCausalLM"

    def forward(self, pixel_values, input_ids, attention_mask, labels):
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=self.encoder(pixel_values), labels=labels).loss


def build(encoder, width, layers, images, device):
    "Two models of the same weights, and what each is fed: the same images and captions."
    torch.manual_seed(0)
    decoder = DecoderConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width//64, intermediate_size=4*width,
                            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = Captioner(CaptionerConfig(encoder=encoder, decoder=decoder))
    scenes = [make_scene(0, i, image_size=encoder.image_size) for i in range(images)]
    transform = image_transform(encoder)
    pixels = torch.stack([transform(Image.fromarray(scene.image)) for scene in scenes]).to(device)
    rows = {k: v.to(device) for k, v in ours.tokenizer([caption for scene in scenes for caption in scene.captions]).items()}
    padded = {k: F.pad(v, (0, PADDED - v.shape[1]), value=-100 if k == "labels" else 0) for k, v in rows.items()}
    theirs = Plain(ours).to(device).train()
    return (ours.to(device).train(), (pixels, rows["input_ids"], rows["labels"])), (theirs, (pixels.repeat_interleave(CAPTIONS, 0), *padded.values()))


def make_step(model, inputs, dtype, device):
    "A function that trains one step and returns its loss."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): out = model(*inputs)
        loss = getattr(out, "loss", out)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()                                            # waits for a GPU
    return step


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(encoder, width, layers, images, dtype, rounds, device):
    "One row of the table."
    steps = [make_step(model, inputs, dtype, device) for model, inputs in build(encoder, width, layers, images, device)]
    losses = [step() for step in steps]                               # the first step is the warm-up, and has untrained weights
    if abs(losses[0] - losses[1]) > TOLERANCE: sys.exit(f"the losses differ: {losses[0]:.5f} ours, {losses[1]:.5f} plain; the two do not compute the same")
    times = []
    for i in range(rounds):
        pair = {j: timed(steps[j]) for j in ((0, 1) if i % 2 == 0 else (1, 0))}
        times.append((pair[0], pair[1]))
    ours = statistics.median(mine for mine, _ in times)
    return dict(encoder="tiny PVT" if encoder.backbone_kwargs else encoder.name, image_size=encoder.image_size, images=images, captions_per_image=CAPTIONS, width=width, layers=layers,
                dtype=str(dtype).removeprefix("torch."), ratio=round(statistics.median(plain / mine for mine, plain in times), 2),
                captions_per_second=round(images*CAPTIONS / ours, 1), loss_ours=losses[0], loss_plain=losses[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model only, 3 rounds: a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    parser.add_argument("--rounds", type=int, help="timed steps of each (default 7; 3 with --quick)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = args.rounds or (3 if args.quick else 7)
    fast_bf16 = fast_precision() == "bf16"
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; ratio: plain time / ours, median of {rounds}"
          + ("" if fast_bf16 else "; no bfloat16: this processor only emulates it"))
    print(f"{'encoder':>12}{'px':>5}{'images':>8}{'captions':>10}{'width':>7}{'layers':>8}{'dtype':>10}{'ratio':>7}{'captions/s':>12}{'loss ours':>11}{'plain':>9}")
    rows = []
    for encoder, width, layers, images, quick in MODELS:
        if args.quick and not quick: continue
        for dtype in (torch.float32, torch.bfloat16)[:1 + fast_bf16]:
            row = measure(encoder, width, layers, images * (8 if device.type == "cuda" else 1), dtype, rounds, device)
            rows.append(row)
            print(f"{row['encoder']:>12}{row['image_size']:>5}{row['images']:>8}{CAPTIONS:>10}{width:>7}{layers:>8}{row['dtype']:>10}{row['ratio']:>7.2f}"
                  f"{row['captions_per_second']:>12.1f}{row['loss_ours']:>11.4f}{row['loss_plain']:>9.4f}", flush=True)
    print(f"smallest ratio {min(row['ratio'] for row in rows)}")
    if args.json:
        with open(args.json, "w") as file: json.dump(rows, file, indent=1)


if __name__ == "__main__": main()
