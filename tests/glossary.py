"""The words of the field: one table, from which nbs/glossary.ipynb is made (`python tests/check.py --fix`).

A row is the number of the notebook that explains the word first, the word, and one line about it.
"""

import re

from house import ROOT, written_notebook

TABLE = """
03 Accelerate: the library that spreads training over processes and GPUs; launched with `accelerate launch`
03 AdamW: the optimizer used here: steps scaled by running means (moments) of gradient and square, plus weight decay
01 attention: a look-up with soft edges: the mean of values, weighted by the softmax of query times key
00 attention_mask: 1 for real tokens, 0 for padding
22 AUROC: the share of pairs of a right and a wrong one in which the right one is ranked higher; 0.5 is a coin
01 backbone: an image network used for its features, without its classifier
03 batch: what is computed together: B images with C captions each
01 BatchNorm: a layer that normalises by the batch while training, and by statistics that it stored afterwards
04 beam search: keep the K likeliest unfinished captions (beams), extend each by every word, keep the K best again
00 BERT: a language model of 2018 (arXiv:1810.04805) whose vocabulary and weights the decoder takes
03 bfloat16: a number in 16 bits: the range of float32 with 3 digits; half the memory, less exact
07b bootstrap: draw as many images as there are, with replacement, and score again, many times: how sure a score is
07 brevity penalty: what BLEU takes off captions that are shorter than their closest reference
02 cache: keys and values of earlier words and of the image, kept so that a step computes only the new word
03 callback: an object of yours whose methods the training loop calls at given moments
02 causal mask: forbids a position to see later words, among which its answer would be
01 channel: one of the numbers that every place of a map or every pixel has; a photo has three
02 checkpoint: weights (and what belongs to them) in a folder, ready to be loaded
03 checksum: a number computed from all bytes of a file; another number says that the file has changed
07 CIDEr: how well the n-grams of a caption agree with those of the references, each weighted by tf-idf; 0 to 10
03 clip: shorten the gradient of a step to a greatest length, so that one odd batch cannot throw the weights far
00 [CLS]: BERT's start token; the first token of every row
03 collate: the function that makes a batch of single records
03 compile: `torch.compile` turns Python code into one program for the processor; slow at first, faster later
01 convolution: one small linear layer applied to every patch of a map
02 cross-attention: attention in which words ask and image tokens answer
00 cross_entropy: PyTorch's loss of a choice: -ln of the probability of the right answer, in the mean
03 DDP: distributed data parallel: every GPU has the whole model and a share of each batch; gradients are averaged
00 #| default_exp: names the module that the notebook exports
01 device: where a tensor lives: `cpu`, `cuda` (a GPU), or `meta`, which has shapes and no memory
07b distinct-n: how many different n-grams the captions have, as a share of all that they have
02 dropout: zero a share of the numbers at random while training, so that nothing leans on a single one
00 embedding: the row of numbers that stands for a token; all rows are the embedding table
00 entropy: the loss of the best guess that knows frequencies only: mean of -ln(frequency)
03 epoch: one pass over all training data
22 expected calibration error: ECE; the mean distance between stated probability and the share that is right, over bins
00 #| export: copies the cell into the package's module of this notebook
00 fast tokenizer: a tokenizer of transformers whose work is done by compiled code
01 feed-forward: two linear layers with a bend between them, applied to each token alone
03 FSDP: fully sharded data parallel: like DDP, but each GPU keeps only a share of weights and optimizer
04 fused: several operations done in one, so that less travels to memory and back
01 GELU: a smooth bend, x times the chance that a normal number is below x; makes layers more than one matrix
01 gradient: how much each number of the model (or of the image) would change the loss
03 gradient accumulation: add up the gradients of several small batches before one step, as if they were one
04 greedy: always take the likeliest word
01 grid: height and width of a map of tokens; it travels with them
01 head: part of attention that has queries, keys and values of its own; also the last layer of a model
00 #| hide: keeps the cell off the web page; it runs and may be exported
01 image token: a vector of width D that stands for one region of the photo
01 ImageNet: a million photos in a thousand classes, on which published backbones were trained
00 inference: using a trained model, without labels
01 key: what a token answers to: queries are compared with it
00 label: the token that must be said next; -100 where nothing is to be learnt
00 language model: gives each possible next word a probability
01 LayerNorm: brings each token to mean 0 and deviation 1, then scales by learnt numbers
03 learning rate: how far a step goes
04 length penalty: what a caption's summed score is divided by, so that long and short ones can be compared
04 log-probability: ln of a probability: 0 is certain, -1 is 37 %; those of the words of a caption add up
00 logit: a score before softmax; larger is likelier
00 loss: the number that training makes smaller; here the mean of -ln(probability of the right word)
04 min-p: sample among the words that are at least p times as likely as the likeliest
03 moment: running mean of a parameter's gradient or of its square, kept by AdamW; a state must hold it
04 n-gram: n words in a row
00 NaN: "not a number", the result of 0/0; whatever it touches becomes NaN
00 nat: unit of surprise: -ln(1/2) = 0.69 nats for a fair coin
01 normaliser: the layer that brings image features to one scale before the decoder reads them
07b p-value: how often chance alone would turn a difference round or make it vanish; small means seldom
00 padding: filler tokens [PAD] that make the rows of a batch equally long
01 parameter: a number that training changes
01 patch: a square of the photo that becomes a token; in code, `@patch` (fastcore) adds a function to a class
02 position: the place of a token in its row; an embedding says it to the decoder
04 prefix: words of your own that a caption begins with, behind the prompt; they are read, not generated
02 pretrained: with weights from earlier training, mostly on much more data
01 projection: a linear layer from one width to another
00 prompt: the words that stand before every caption, in training and in use
01 PVT: Pyramid Vision Transformer: attention in four stages with fewer and wider tokens
01 query: what a token asks: it is compared with keys
01 reduction: keys and values of R × R tokens gathered into one, so that all ask and few answer
07 reference: what a person wrote about the picture; metrics compare captions with it
04 repetition penalty: divides the score of what was said already, so that it is less likely to come again
01 residual path: the sum that carries a token's vector past each layer, which only adds to it
02 safetensors: a file format for weights that holds numbers only, no code
04 sampling: draw the next word by its probability
03 scaler: in fp16, multiplies the loss so that small gradients do not vanish, and divides again
03 seed: the number that random draws begin with; the same seed, the same draws
02 self-attention: attention of the words of a row on each other
00 [SEP]: BERT's end token: the word for "I am done"
00 shift: the answer to input i is label i + 1; done once, in the loss
05 signed distance: how far a point is from an outline, negative inside; shapes are drawn with it
03 #| slow: marks a cell that runs only when asked for (`nbdev_test --flags slow`)
00 softmax: exp of each score, divided by their sum: shares that sum to 1
01 stage: a part of PVT that works at one resolution
01 state dict: names and values of all weights of a model
01 stochastic depth: skip a branch for whole images at random while training
01 stride: step from one patch of a convolution to the next
04 temperature: divides the scores before softmax: below 1 sharper, above 1 flatter
00 test_eq: fastcore's test that two things are equal
00 test_fail: fastcore's test that a call raises an error which contains given words
07 tf-idf: the weight of a word: how often it is said here, times the logarithm of how rare it is elsewhere
02 tied: the output layer uses the embedding table, so words mean the same at both ends
01 timm: a library of image models by Ross Wightman; ours are compared with its
00 token: a word or a piece of one; its id is a row number of the vocabulary
04 top-k: sample among the k likeliest words only
04 top-p: sample among the likeliest words that together reach probability p
00 transformers: Hugging Face's library of language models
04 underflow: a number too small for its format is rounded to 0; sums of logarithms avoid it
00 [UNK]: stands for what the vocabulary cannot write
01 value: what a token hands over where attention falls on it
01 #| varies: marks a cell whose numbers differ from machine to machine, so that a check skips them
00 vocabulary: the list of all tokens, 30,522 for BERT; the line number is the id
03 warm-up: let the learning rate rise over the first steps, while moments are still rough
03 weight decay: pull each weight towards 0 a little in every step; matrices only
00 WordPiece: cuts words into the longest pieces that the vocabulary has
"""


def anchor(term):
    "How a link names the term: `fast-tokenizer`."
    return re.sub(r'[^\w -]', '', term).strip(' -').lower().replace(' ', '-')


def terms():
    "[(term, its meaning, name of the notebook that explains it)] as the table has them."
    names = {file.stem.partition('_')[0]: file.stem for file in ROOT.glob('nbs/[0-9]*.ipynb')}
    rows = (line.split(' ', 1) for line in TABLE.strip().splitlines())
    return [(*rest.split(': ', 1), names[number]) for number, rest in rows]


def page():
    "The text of nbs/glossary.ipynb."
    cells = [
        '# Words of the field\n\n> What they mean here, each in a line, with the notebook that explains it',
        'A line that begins with `#|` is for nbdev, which makes the package and this site. Notebooks link here '
        'where a word comes up.',
    ]
    letter = None
    for term, meaning, notebook in sorted(terms(), key=lambda row: anchor(row[0])):
        if letter != anchor(term)[0]:
            letter = anchor(term)[0]
            cells.append(f'## {letter.upper()}')
        # code marks would change the anchor of a heading, so there are none
        cells[-1] += f'\n\n#### {term}\n\n{meaning} ([{notebook}]({notebook}.ipynb))'
    return cells


def notebook():
    "nbs/glossary.ipynb as it is written."
    return written_notebook('words', page())
