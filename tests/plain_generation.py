"""Every strategy by its plain definition: one image, Python lists, the whole text read again for every token.
`generate` must say the same.
"""

import math

import torch

from pvtblip.generation import alternatives


def plain_generate(model, image, config, draws=None):
    """[(score, ids, token log-probabilities)] for one image (1, S, D), the best first; `draws[r][i]` is the
    number for token i of draw r.
    """
    said = (
        model.tokenizer.prompt_ids
        + model.tokenizer.tokenizer(config.prefix, add_special_tokens=False)['input_ids']
    )
    ids_of = model.output_ids.tolist()
    world = World(model, image, ids_of, config)
    if config.num_beams > 1:
        return beam_search(world, said, config)[: config.num_return_sequences]
    return [one_by_one(world, said, config, draws and draws[r]) for r in range(config.num_return_sequences)]


class NoWordLeft(Exception):
    pass


class World:
    "Logits, and what the rules make of them, as {token id: number}."

    def __init__(self, model, image, ids_of, config):
        self.model = model
        self.image = image
        self.ids = ids_of
        self.config = config
        self.end, self.start = model.tokenizer.sep_token_id, model.tokenizer.prompt_length
        names = model.tokenizer.tokenizer.convert_ids_to_tokens(ids_of)
        self.pieces = {i for i, name in zip(ids_of, names) if name.startswith('##')}
        self.words = alternatives(config.force_words_ids or [])

    def logits(self, ids):
        with torch.inference_mode():
            logits = self.model.decoder(torch.tensor([ids]), self.image)[0, -1]
        return {i: float(logits[i]) for i in self.ids}

    def log_probabilities(self, ids):
        logits = self.logits(ids)
        total = math.log(sum(math.exp(v) for v in logits.values()))
        return {i: v - total for i, v in logits.items()}

    def ruled(self, ids, values):
        "Penalise what was said; drop what may not be said."
        config = self.config
        kept = {}
        for token, value in values.items():
            if config.repetition_penalty != 1 and token in ids:
                value = value * config.repetition_penalty if value < 0 else value / config.repetition_penalty
            new = [*ids, token]
            n = config.no_repeat_ngram_size
            repeats = n and new[-n:] in [ids[i : i + n] for i in range(len(ids) - n + 1)]
            bad = any(new[-len(word) :] == word for word in config.bad_words_ids or [])
            if not repeats and not bad and not (token == self.end and len(ids) < config.min_length):
                kept[token] = value
        return kept

    def says(self, ids, word):
        "Does the caption say these tokens, as a whole word?"
        return any(
            ids[i : i + len(word)] == word and not {*ids[i + len(word) : i + len(word) + 1]} & self.pieces
            for i in range(len(ids))
        )

    def missing(self, ids):
        """Tokens that must at least be added: all of the words that were not said, less what was begun of one
        of them.
        """
        ids = ids[self.start :]
        unsaid = [word for word in self.words if not any(self.says(ids, one) for one in word)]
        best = needed = sum(min(len(one) for one in word) for word in unsaid)
        for word in unsaid:
            for one in word:
                for n in range(1, len(one)):
                    if n <= len(ids) and ids[-n:] == one[:n]:
                        best = min(best, needed - min(map(len, word)) + len(one) - n)
        return best


def one_by_one(world, said, config, draws):
    ids = list(said)
    logprobs = []
    while len(ids) < config.max_length:
        values = world.ruled(ids, world.logits(ids))
        if not values:
            raise NoWordLeft
        token = (
            draw(values, config, draws[len(logprobs)]) if config.do_sample else max(values, key=values.get)
        )
        logprobs.append(world.log_probabilities(ids)[token])
        ids.append(token)
        if token == world.end:
            break
    return sum(logprobs) / len(logprobs) ** config.length_penalty, ids, logprobs


def draw(values, config, number):
    """Temperature, top-k, top-p, min-p, then the word where the probabilities in the vocabulary's order add
    up to more than the number.
    """
    values = {token: value / config.temperature for token, value in values.items()}
    if config.top_k:
        values = {
            token: value
            for token, value in values.items()
            if value >= sorted(values.values())[-min(config.top_k, len(values))]
        }
    chance = probabilities(values)
    kept = {}
    before = 0.0
    for token in sorted(chance, key=chance.get, reverse=True):
        if before < config.top_p:
            kept[token] = values[token]
        before += chance[token]
    chance = probabilities(kept)
    kept = {
        token: value for token, value in kept.items() if chance[token] >= config.min_p * max(chance.values())
    }
    reached = 0.0
    for token, chance in sorted(probabilities(kept).items()):
        reached += chance
        if reached > number:
            return token


def probabilities(values):
    top = max(values.values())
    total = sum(math.exp(v - top) for v in values.values())
    return {token: math.exp(v - top) / total for token, v in values.items()}


def beam_search(world, said, config):
    G = config.num_beam_groups
    k = config.num_beams // config.num_beam_groups
    P = len(said)
    L = config.max_length
    running = [[(0.0, list(said), [])] for _ in range(G)]  # for each group: (sum, ids, log-probabilities)
    finished = [[] for _ in range(G)]
    stopped = [False] * G
    for length in range(P + 1, L + 1):
        taken = []  # what earlier groups go on with at this position
        for g in range(G):
            if stopped[g]:
                continue
            best = in_turn(world, continuations(world, running[g], taken, config, L - length), 2 * k)
            ends = lambda ids: ids[-1] == world.end or len(ids) == L
            scored = (length - P) ** config.length_penalty
            finished[g] += [(total / scored, ids, logprobs) for total, ids, logprobs in best[:k] if ends(ids)]
            finished[g] = sorted(finished[g], key=lambda x: -x[0])[:k]
            running[g] = [x for x in best if not ends(x[1])][:k]
            taken += [x[1][-1] for x in [x for x in best if x[1][-1] != world.end][:k]]
            stopped[g] = must_stop(running[g], finished[g], k, config, length - P, L - P)
    found = sorted((x for group in finished for x in group), key=lambda x: -x[0])
    if len(found) < config.num_return_sequences:
        raise NoWordLeft
    return found


def continuations(world, beams, taken, config, room):
    """Every continuation that keeps to the rules and leaves room for what is still missing: (sum, ids,
    log-probabilities).
    """
    found = []
    for total, ids, logprobs in beams:
        own = world.log_probabilities(ids)
        for token, value in world.ruled(ids, own).items():
            value -= config.diversity_penalty * taken.count(token)
            if world.missing([*ids, token]) <= (0 if token == world.end else room):
                found.append((total + value, [*ids, token], [*logprobs, own[token]]))
    return found


def in_turn(world, found, n):
    "The best of each bank, then the second of each, and so on; the bank that lacks least comes first."
    banks = {}
    for one in sorted(found, key=lambda x: -x[0]):
        banks.setdefault(world.missing(one[1]), []).append(one)
    ranked = [(rank, lack, one) for lack, bank in banks.items() for rank, one in enumerate(bank)]
    return [one for _, _, one in sorted(ranked, key=lambda x: x[:2])][:n]


def must_stop(running, finished, k, config, length, longest):
    if not running:
        return True
    if len(finished) < k:
        return False
    reach = longest if config.early_stopping == 'never' and config.length_penalty > 0 else length
    return (
        config.early_stopping is True
        or max(x[0] for x in running) / reach**config.length_penalty <= finished[-1][0]
    )
