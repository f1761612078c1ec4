"""Planted bugs of checkpoints, data, held-out loss and tokenizer."""

from parity.core.compare import JAX
from parity.mutants.catalogue.mutant import area, jax, shared, torch

# --- files
area("checkpoint")
FILES = {"check": "files"}
shared(
    "masters rounded to bfloat16",
    "run.checkpoint:_write_tensors",
    "write_tensors(folder / shard, kept)",
    "write_tensors(folder / shard, {k: (x.view('uint32') & 0xFFFF0000).view('float32') for k, x in kept.items()})",
    place="save_checkpoint",
    **FILES,
)
shared(
    "mu and nu swapped on saving",
    "run.checkpoint:_write_tensors",
    "{'mu': state.mu, 'nu': state.nu}",
    "{'nu': state.mu, 'mu': state.nu}",
    place="save_checkpoint",
    **FILES,
)
shared(
    "the update count is the step",
    "run.checkpoint:_write_rest",
    "state.adam_count",
    "state.step",
    place="save_checkpoint",
    **FILES,
)
shared(
    "mu and nu swapped on loading",
    "run.checkpoint:load_checkpoint",
    "mu, nu = moments",
    "nu, mu = moments",
    place="load_checkpoint",
    quick=True,
    **FILES,
)
shared("loaded at step 0", "run.checkpoint:load_checkpoint", "content['step']", "0", place="load_checkpoint", **FILES)
shared(
    "the update count is not restored",
    "run.checkpoint:load_checkpoint",
    "content['adam_count']",
    "0",
    place="load_checkpoint",
    **FILES,
)
shared(
    "the same moment twice",
    "run.checkpoint:load_checkpoint",
    "name.startswith(label + '.')",
    "name.startswith('mu.')",
    place="load_checkpoint",
    **FILES,
)
shared(
    "bfloat16 cut off, not rounded",
    "files.export:_bytes",
    "bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))",
    "bits",
    place="export",
    **FILES,
)
shared(
    "config: eps of the default",
    "hf_config:from_hf",
    "return ModelConfig.from_dict(config)",
    "return ModelConfig.from_dict(config | {'rms_norm_eps': 1e-6})",
    place="to_hf",
    **FILES,
)
shared(
    "config: scaling of the frequencies lost",
    "hf_config:_take_rope",
    "config['rope_scaling'] = scalings[0] if scalings else None",
    "config['rope_scaling'] = None",
    place="to_hf",
    **FILES,
)
shared("config: window lost", "hf_config:to_hf", "cfg.model_type != 'mistral'", "True", place="to_hf", **FILES)
shared(
    "config: heads for key/value heads",
    "hf_config:from_hf",
    "config['num_key_value_heads'] is None",
    "True",
    place="to_hf",
    **FILES,
)
jax(
    "layer 10 before layer 2",
    "params:param_leaves",
    'tuple(f"{LAYERS}{i}.{suffix}" for i in range(cfg.num_hidden_layers))',
    'tuple(f"{LAYERS}{i}.{suffix}" for i in sorted(range(cfg.num_hidden_layers), key=str))',
    place="model.layers.2.input_layernorm",
    runs="logits",
)
torch("moments not restored", "engine.checkpoint:from_training_state", "copy(mu, saved.mu[name])", "pass", "resume")
jax(
    "mu restored as nu",
    "engine.checkpoint:from_training_state",
    "optax.tree_utils.tree_set(opt_state, mu=mu, nu=nu)",
    "optax.tree_utils.tree_set(opt_state, mu=nu, nu=nu)",
    "resume",
)
jax(
    "schedule starts again on resuming",
    "engine.train:fit",
    "step, previous = int(state.step), PreviousStep(int(state.adam_count), train.max_skipped_steps)",
    "step, previous = 0, PreviousStep(int(state.adam_count), train.max_skipped_steps)\nuntil_step = until_step and "
    "until_step - int(state.step)",
    "resume",
)
shared(
    "skipped updates are counted",
    "run.previous_step:PreviousStep.resolve",
    'self.count += not metrics["skipped"]',
    "self.count += 1",
    "runs",
    place="fit (skipped updates)",
    side=JAX,  # torch counts its own
)
shared(
    "one skipped update too many",
    "run.previous_step:PreviousStep.resolve",
    "self._skipped_in_row >= self.max_skipped_steps",
    "self._skipped_in_row > self.max_skipped_steps",
    "runs",
)
torch(
    "bias correction starts again on resuming",
    "engine.checkpoint:from_training_state",
    "trainer.step, trainer.optimizer.count = saved.step, saved.adam_count",
    "trainer.step = saved.step",
    "resume",
)

area("bookkeeping")
KEPT = {"check": "bookkeeping"}
shared(
    "the newest checkpoint by its name",
    "run.checkpoint:latest_checkpoint",
    "int(folder.name[5:])",
    "folder.name",
    place="checkpoints",
    **KEPT,
)
shared(
    "later events stay in the log",
    "run.log:RunLog._drop_later_rows",
    "place(row) <= self.step",
    "'event' in row or place(row) <= self.step",
    place="RunLog",
    **KEPT,
)
shared(
    "no text ends at id 0",
    "run.settings:trained_ends",
    "0 <= x < 2**31",
    "0 < x < 2**31",
    place="trained_ends",
    quick=True,
    **KEPT,
)
shared(
    "the first prompt's length alone",
    "tensors:check_prompts",
    "int(lengths.max()) + max_new_tokens",
    "len(rows[0]) + max_new_tokens",
    place="check_prompts",
    **KEPT,
)
shared(
    "a context of one id",
    "data.evaluation:DocumentEvaluation._of",
    "self.seq_len - len(self.context) + 1",
    "self.seq_len",
    place="DocumentEvaluation",
    **KEPT,
)
shared(
    "an answer that begins as the generation prompt goes on",
    "data.answers:ExampleReader._conversation",
    "zip(whole, start, other, strict=False)",
    "zip(whole, start, strict=False)",
    place="ExampleReader",
    **KEPT,
)

area("data")
DATA = {"check": "data"}
shared(
    "targets not shifted",
    "data.datasets:TokenDataset.batch",
    "windows[:, 1:]",
    "windows[:, :-1]",
    place="TokenDataset.batch",
    **DATA,
)
shared(
    "windows overlap",
    "data.datasets:TokenDataset.batch",
    "self._order(number) * self.stride",
    "self._order(number) * (self.stride - 1)",
    place="TokenDataset.batch",
    **DATA,
)
shared(
    "windows one token apart",
    "data.datasets:TokenDataset.batch",
    "self._order(number) * self.stride",
    "self._order(number) * self.stride + 1",
    place="TokenDataset.batch",
    **DATA,
)
shared(
    "the same order every epoch",
    "data.datasets:Order.__call__",
    "random_bits.fold_in(random_bits.fold_in(random_bits.key(self.seed), ORDER), epoch)",
    "random_bits.fold_in(random_bits.key(self.seed), ORDER)",
    place="Order",
    **DATA,
)
shared(
    "no order at all",
    "data.datasets:Order.__call__",
    "left << self._bits | right",
    "number % self.n",
    place="Order",
    **DATA,
)
shared(
    "samples drawn with repetition",
    "data.datasets:Order.__call__",
    "divmod(number, self.n)",
    "divmod(number // 2, self.n)",
    place="TokenDataset.batch",
    quick=True,
    **DATA,
)
shared(
    "all hosts read the same rows",
    "data.datasets:host_rows",
    "step * batch_size + host * rows",
    "step * batch_size",
    place="host_rows",
    **DATA,
)
shared(
    "hosts skip ahead of each other",
    "data.datasets:host_rows",
    "step * batch_size + host * rows",
    "(step + host) * batch_size + host * rows",
    place="host_rows",
    **DATA,
)
shared(
    "the prompt is learned too",
    "data.answers:example_row",
    "targets[answer - 1 - start : end - 1 - start] = tokens[answer:end]",
    "targets[: end - 1 - start] = tokens[start + 1 : end]",
    place="ExampleDataset.batch",
    **DATA,
)
shared(
    "answers one token late",
    "data.answers:example_row",
    "targets[answer - 1 - start : end - 1 - start] = tokens[answer:end]",
    "targets[answer - start : end - 1 - start] = tokens[answer + 1 : end]",
    place="ExampleDataset.batch",
    **DATA,
)

area("held-out loss")
EVALUATION = {"check": "evaluation"}
shared(
    "the last window is dropped",
    "data.evaluation:Evaluation.__init__",
    "math.ceil((len(tokens) - 1) / seq_len)",
    "(len(tokens) - 1) // seq_len",
    place="Evaluation.batches",
    **EVALUATION,
)
shared(
    "padding counted",
    "data.evaluation:Evaluation.batches",
    "np.full((self.batch_size, self.seq_len), IGNORED, np.int32)",
    "np.zeros((self.batch_size, self.seq_len), np.int32)",
    place="Evaluation.batches",
    **EVALUATION,
)
shared(
    "bits per byte in nats",
    "data.evaluation:Evaluation.summary",
    "math.log(2)",
    "1.0",
    place="Evaluation.summary",
    **EVALUATION,
)
shared(
    "bytes of the inputs",
    "data.evaluation:Evaluation.n_bytes",
    "self.tokens[1 : 1 + self.n_targets]",
    "self.tokens[: self.n_targets]",
    place="Evaluation.n_bytes",
    **EVALUATION,
)
jax(
    "mean of the batches' means",
    "engine.evaluate:evaluate",
    "total, count = total + float(to_host(loss).astype(np.float64).sum()), count + int(to_host(n).sum())",
    "total, count = total + float(to_host(loss).sum()) / int(to_host(n).sum()), count + 1",
    place="evaluate",
    **EVALUATION,
)
torch(
    "sum in the last batch alone",
    "engine.evaluate:evaluate",
    "total, count = total + float(loss.double().sum()), count + int(n.sum())",
    "total, count = float(loss.double().sum()), count + int(n.sum())",
    place="evaluate",
    **EVALUATION,
)

area("tokenizer")
BPE = {"check": "tokenizer"}
TRAINING = {"place": "train_bpe", **BPE}
ENCODING = {"place": "Tokenizer.encode", **BPE}
shared("of equal pairs the lesser first", "text.bpe_trainer:_reversed", "chr(255 - b)", "chr(b)", **TRAINING)
shared(
    "words counted once",
    "text.bpe_trainer:_as_bytes",
    "{word.encode('utf-8'): n for word, n in counts.items()}",
    "{word.encode('utf-8'): 1 for word in counts}",
    **TRAINING,
)
shared(
    "counts not lowered",
    "text.bpe_trainer:_Pairs.merge",
    "(old := p << 32 | a) in counts",
    "(old := p << 32 | a) in ()",
    **TRAINING,
)
shared(
    "the floor falls too far",
    "text.bpe_trainer:_Pairs.look_through",
    "sums >= self.floor",
    "sums > self.floor",
    **TRAINING,
)
shared(
    "merged with what is gone",
    "text.bpe_trainer:_Pairs._merge_few",
    "ids[i] != a or ids[j] != b or not alive[i]",
    "ids[j] != b",
    quick=True,
    **TRAINING,
)
shared(
    "the left neighbour sought too far right",
    "text.bpe_trainer:_Pairs._merge_few",
    "left[p].append(i - sizes[p])",
    "left[p].append(i)",
    **TRAINING,
)
shared(
    "every second pair of a row forgotten",
    "text.bpe_trainer:_Pairs._merge_many",
    "at = at[in_row % 2 == 0]",
    "at = at[in_row % 2 == 1]",
    **TRAINING,
)
shared("learned from special tokens", "text.bpe_trainer:_count", "i % 2 == 0", "i >= 0", **TRAINING)
shared(
    "the pair before a merge forgotten",
    "text.bpe_words:WordEncoder._merge_short",
    "rank_of((ids[i - 1], joined), NOT_MERGED)",
    "NOT_MERGED",
    **ENCODING,
)
shared(
    "merged with what is gone in a long word",
    "text.bpe_words:WordEncoder._merge_long",
    "ranks[i] != rank",
    "False",
    **ENCODING,
)
shared("special tokens cut like text", "text.tokenizer:Tokenizer.encode", "finder is None", "True", **ENCODING)
shared("chunks cut a word", "text.words:_cuts", "found.start() + 1", "found.start() + 2", **ENCODING)
shared("chunks cut a special token", "text.words:stream_blocks", "len(buffer) - reserve", "len(buffer)", **ENCODING)
shared(
    "a space is a letter",
    "text.words:write_out",
    "content if inside else f'[{content}]'",
    "content if inside else f'[{content} ]'",
    **TRAINING,
)
shared(
    "decoding drops what is not UTF-8",
    "text.tokenizer:Tokenizer.decode",
    "self.vocab.get(int(i), replacement)",
    "self.vocab.get(int(i), replacement).strip()",
    place="Tokenizer.decode",
    **BPE,
)
shared(
    "characters for bytes",
    "text.bpe_words:WordEncoder._encode_word",
    "word.encode('utf-8')",
    "word.encode('ascii', 'replace')",
    **ENCODING,
)
