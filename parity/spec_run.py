"""The specification of a run, in plain NumPy: step scalars, steps that are skipped, the order of batches, what is
counted.

`spec.py` is the mathematics of one step; this is what happens around it. It imports none of the three packages.
Settings come as values with the names that the configs of the packages have, or as plain numbers.
"""

import hashlib
import math

import numpy as np

from parity import spec

IGNORE_INDEX = spec.IGNORE_INDEX
ORDER = 0x6F726465  # "orde": folded into the seed's key for the order of windows


# --- the scalars of a step


def learning_rate(opt, step):
    """Linear warmup from 0, a cosine to lr_min at total_steps, then lr_min."""
    if step < opt.warmup_steps:
        return opt.lr_max * step / opt.warmup_steps
    progress = min(1.0, (step - opt.warmup_steps) / (opt.total_steps - opt.warmup_steps))
    return opt.lr_min + (opt.lr_max - opt.lr_min) * (1.0 + math.cos(math.pi * progress)) / 2.0


def bias_corrections(opt, n):
    """What the moments of the n-th update, n = 1, 2, ..., are divided by."""
    return tuple(1.0 - math.prod([beta] * n) for beta in (opt.beta1, opt.beta2))


# --- steps


def train_step(w, mu, nu, step, adam_count, ids, targets, cfg, opt, separator=None):
    """One step: gradients, clip, AdamW. A non-finite norm skips the update. Returns the new state, loss and norm."""
    loss, grads = spec.loss_and_grads(w, ids, targets, cfg, separator=separator)
    grads, norm = spec.clip(grads, opt.max_grad_norm)
    if math.isfinite(norm):
        adam_count += 1
        w, mu, nu = spec.adamw_step(w, mu, nu, grads, opt, learning_rate(opt, step), adam_count)
    return (w, mu, nu, step + 1, adam_count), loss, norm


def train(state, batch, until, cfg, opt, separator=None, max_skipped=10):
    """Steps to `until` from (weights, mu, nu, step, adam_count); batch(step) gives inputs and targets. Returns the
    state and, for every step, what its log says.

    A loss that is summed over micro-batches, chunks or devices is this one: the mean over the counted tokens of the
    whole batch. Raises ArithmeticError after `max_skipped` skipped updates in a row.
    """
    rows, in_row = [], 0
    while state[3] < until:
        number, updates = state[3], state[4]
        with np.errstate(all="ignore"):  # what is not finite is skipped
            state, loss, norm = train_step(*state, *batch(number), cfg, opt, separator)
        skipped = state[4] == updates
        rows.append({"loss": loss, "grad_norm": norm, "lr": learning_rate(opt, number), "skipped": float(skipped)})
        in_row = in_row + 1 if skipped else 0
        if in_row >= max_skipped:
            raise ArithmeticError(f"{in_row} updates in a row were skipped, to step {state[3]}")
    return state, rows


# --- data


def order(seed, epoch, n):
    """The numbers of an epoch's n windows, out of a table of the whole permutation of a square's cells."""
    key = spec.fold_in(spec.fold_in((0, seed), ORDER), epoch)
    side = 2
    while side * side < n:
        side *= 2
    column, row = (x.astype(np.uint64) for x in np.divmod(np.arange(side * side), side))
    for word in spec.random_bits(key, 6):
        x = (row ^ word) & np.uint64(2**32 - 1)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
        column, row = row, column ^ ((x ^ (x >> np.uint64(16))) % np.uint64(side))
    table, numbers = (column * np.uint64(side) + row).tolist(), []
    for cell in range(n):
        cell = table[cell]
        while cell >= n:
            cell = table[cell]
        numbers.append(cell)
    return np.array(numbers)


def _numbers_of(seed, n, batch_size, step):
    """Which of n windows the rows of a step's batch are: one epoch's permutation after the other, batches cross their
    ends.
    """
    rows = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: order(seed, epoch, n) for epoch in {row // n for row in rows}}
    return [int(orders[row // n][row % n]) for row in rows]


def is_held_out(text, share):
    """Whether a document is held out, by its text alone; of an example the text is prompt, newline, answer."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < share * 2**64


def batch(tokens, length, batch_size, seed, step):
    """Inputs and targets (B, T) of a step: windows of T + 1 tokens every T tokens; what is left at the end is
    not used.
    """
    n = (len(tokens) - 1) // length
    starts = [length * i for i in _numbers_of(seed, n, batch_size, step)]
    windows = np.stack([np.asarray(tokens[start : start + length + 1], np.int64) for start in starts])
    return windows[:, :-1], windows[:, 1:]


def rows_of_host(rows, host, n_hosts):
    """The part of a batch that a host reads: as many rows as every other, in order."""
    each = len(rows) // n_hosts
    return rows[host * each : (host + 1) * each]


def example_rows(examples, length):
    """Inputs and targets (n, T) of prompts and answers: only the tokens of the answer are counted; zeros follow the
    end.
    """
    inputs, targets = np.zeros((len(examples), length), np.int64), np.full((len(examples), length), IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(examples):
        ids = [*prompt, *answer]
        inputs[row, : len(ids) - 1] = ids[:-1]
        for place in range(max(1, len(prompt)), len(ids)):  # nothing predicts a first token
            targets[row, place - 1] = ids[place]
    return inputs, targets


def example_batch(examples, length, batch_size, seed, step):
    """Inputs and targets (B, T) of a step."""
    return example_rows([examples[i] for i in _numbers_of(seed, len(examples), batch_size, step)], length)


def held_out_rows(tokens, length):
    """Held-out tokens in windows, in order, the last filled up with what is not counted: inputs and targets (n, T)."""
    starts = range(0, len(tokens) - 1, length)
    inputs, targets = np.zeros((len(starts), length), np.int64), np.full((len(starts), length), IGNORE_INDEX)
    for row, start in enumerate(starts):
        window = np.asarray(tokens[start : start + length + 1], np.int64)
        inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
    return inputs, targets


def rolling_rows(documents, context, length):
    """Documents one by one in windows of at most `length` inputs: inputs and targets (n, length), as lm-eval rolls
    them.

    Every token is predicted once, but for a first one without a context. A window begins with the last token of the one
    before; the last reaches as far back as a window does.
    """
    inputs, targets = [], []
    for ids in documents:
        whole, start = [*context, *ids], max(1, len(context))
        end = min(len(whole), length + 1)
        while start < len(whole):
            first = max(0, end - 1 - length)
            row, wanted = [0] * length, [IGNORE_INDEX] * length
            row[: end - 1 - first] = whole[first : end - 1]
            wanted[start - 1 - first : end - 1 - first] = whole[start:end]
            inputs.append(row)
            targets.append(wanted)
            start, end = end, min(len(whole), end + length)
    return np.array(inputs), np.array(targets)


def divided(sizes, most):
    """Names of tensors in files, in order: a file takes the next one as long as it holds at most so many bytes."""
    files = []
    for name, size in sizes.items():
        if not files or sum(sizes[x] for x in files[-1]) + size > most:
            files.append([])
        files[-1].append(name)
    return files


# --- evaluation


def held_out(w, inputs, targets, cfg, bytes_of_ids=None, separator=None):
    """What an evaluation reports of rows of held-out tokens: every counted token weighs the same.

    bytes_of_ids: how many bytes of text each id stands for.
    """
    counted = targets != IGNORE_INDEX
    logits, _ = spec.forward(w, inputs, cfg, separator=separator)
    total = spec.cross_entropy(logits, targets) * counted.sum()
    loss = total / counted.sum()
    found = {"loss": loss, "perplexity": math.exp(loss), "tokens": float(counted.sum())}
    if bytes_of_ids is not None:
        n = sum(int(bytes_of_ids[i]) for i in targets[counted])
        found |= {"bytes": float(n), "bits_per_byte": total / n / math.log(2.0)}
    return found


# --- texts


def document(prefix, ids, end):
    """A document as a sequence: what the tokenizer puts before a text, its ids, and the id that ends it, if one
    does.
    """
    return [*prefix, *ids, *([] if end is None else [end])]


def example(prefix, ids, ends, at, turn_end):
    """The ids of a prompt with its answer, divided: a token that has a character past `at` is the answer's.

    ids: of prompt and answer as one text; ends: where each token's last character is.
    """
    n = sum(1 for end in ends if end <= at)
    return [*prefix, *ids[:n]], [*ids[n:], *([] if turn_end is None else [turn_end])]
