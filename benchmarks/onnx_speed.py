"""How fast is a captioner as two ONNX graphs, compared with pvtblip itself?

    pip install 'pvtblip[onnx]'
    python benchmarks/onnx_speed.py [--model DIR] [--graphs DIR] [--rounds N]

The captioner of the demo and one with PVT v2-b0 and a BERT of six layers, both with random weights; or the
model that is given. Both sides run in this process on one thread, in turn; what is counted is the time that the
thread computes (`time.thread_time`), which a busy machine changes little. The ratio is the median of (our time /
the graphs'): above 1 the graphs are faster. Ours is packed, as `load_model` does it. Parts: `photo`, the encoder
with the keys and values of its image tokens; `word`, one step behind six words; `caption`, both and the search,
greedy, with as many words on both sides, whose tokens must be the same.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pvtblip.decoder import Captioner, CaptionerConfig, DecoderConfig
from pvtblip.demo import demo_config
from pvtblip.fast import load_model
from pvtblip.generation import generate
from pvtblip.onnx_export import OnnxCaptioner, export_onnx

BERT = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
MODELS = {'demo': demo_config, 'pvt_v2_b0': lambda: CaptionerConfig(decoder=DecoderConfig(**BERT))}
WORDS = 12


def shaken(config):
    "A captioner of random weights that never ends of itself."
    torch.manual_seed(0)
    model = Captioner(config).eval().requires_grad_(False)
    for weight in model.decoder.parameters():
        weight += 0.03 * torch.randn_like(weight)
    model.decoder.cls['predictions'].bias[model.tokenizer.sep_token_id] = -1e4
    return model


def seconds(function):
    start = time.thread_time()
    function()
    return time.thread_time() - start


def word(model, image_tokens, ids):
    "A function that computes one step behind the words `ids`, again and again."
    step = model.next_token(image_tokens)
    step(ids[:, :-1])

    def again():
        kept = (step.words, 0) if hasattr(step, 'words') else (step.cache.words[:], step.cache.length)
        step(ids[:, -1:])
        if hasattr(step, 'words'):
            step.words = kept[0]
        else:
            step.cache.words, step.cache.length = kept

    return again


def photo(model, pixel_values):
    "The encoder and all that is computed once a photo."
    return lambda: model.next_token(model.encode_image(pixel_values))


def caption(model, pixel_values):
    longest = model.tokenizer.prompt_length + WORDS
    return lambda: generate(model, pixel_values, max_length=longest).sequences.tolist()


def parts(models, pixel_values):
    "{part: (our function, the graphs')}"
    ids = torch.tensor([[*models[0].tokenizer.prompt_ids, 2000, 2001, 2002]] * len(pixel_values))
    return {
        'photo': [photo(model, pixel_values) for model in models],
        'word': [word(model, model.encode_image(pixel_values), ids) for model in models],
        'caption': [caption(model, pixel_values) for model in models],
    }


def measure(pair, rounds):
    "Median milliseconds of both, and the median ratio, after a warm-up of each."
    for function in pair:
        function()
    times = []
    for i in range(rounds):
        found = [seconds(function) for function in pair[:: 1 if i % 2 == 0 else -1]]
        times.append(found if i % 2 == 0 else found[::-1])
    ours, theirs = (1e3 * statistics.median(one) for one in zip(*times))
    return ours, theirs, statistics.median(mine / other for mine, other in times)


@torch.inference_mode()
def compare(name, folder, graphs, rounds):
    "The rows of one model."
    models = load_model(folder, 'cpu'), OnnxCaptioner(graphs)
    side = models[0].config.encoder.image_size
    for batch in (1, 8):
        pixel_values = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        same = True
        for part, pair in parts(models, pixel_values).items():
            if part == 'caption':
                same = pair[0]() == pair[1]()
            ours, theirs, ratio = measure(pair, rounds)
            print(f'{name:12}{batch:6}  {part:10}{ours:10.1f}{theirs:10.1f}{ratio:8.2f}', flush=True)
        print(f'{name:12}{batch:6}  the same tokens: {same}', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', metavar='DIR', help='a model folder, instead of the two')
    parser.add_argument('--graphs', metavar='DIR', help='its graphs, if they are there already')
    parser.add_argument('--rounds', type=int, default=5, help='timed calls of each (5)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f'{"model":12}{"batch":>6}  {"part":10}{"ours, ms":>10}{"graphs":>10}{"ratio":>8}')
    with tempfile.TemporaryDirectory() as place:
        names = {Path(args.model).name: args.model} if args.model else dict.fromkeys(MODELS)
        for name, folder in names.items():
            graphs = args.graphs
            if folder is None:
                folder = Path(place) / name
                shaken(MODELS[name]()).save_pretrained(folder)
            if graphs is None:
                graphs = Path(place) / f'{name}-graphs'
                export_onnx(folder, graphs, log=lambda line: None)
            compare(name, folder, graphs, args.rounds)


if __name__ == '__main__':
    main()
