"""The two lessons and their formulas as one page."""

import ast
import html
import itertools
from dataclasses import dataclass
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]


PAGE = ROOT / "docs" / "side_by_side.html"


def mrow(*parts: str) -> str:
    """A row of ready MathML, or of words: letters become identifiers, digits numbers and the rest operators."""
    return "<mrow>" + "".join(part if part.startswith("<") else _words(part) for part in parts) + "</mrow>"


def _words(text: str) -> str:
    tags = []
    for word in text.split():
        tag = "mi" if word[0].isalpha() else "mn" if word[0].isdigit() else "mo"
        tags.append(f"<{tag}>{html.escape(word)}</{tag}>")
    return "".join(tags)


def sub(base: str, index: str) -> str:
    return f"<msub>{mrow(base)}{mrow(index)}</msub>"


def sup(base: str, exponent: str) -> str:
    return f"<msup>{mrow(base)}{mrow(exponent)}</msup>"


def frac(top: str, bottom: str) -> str:
    return f"<mfrac>{mrow(top)}{mrow(bottom)}</mfrac>"


def root(inside: str) -> str:
    return f"<msqrt>{mrow(inside)}</msqrt>"


def hat(letter: str) -> str:
    return f"<mover>{mrow(letter)}<mo>^</mo></mover>"


def math(*lines: str) -> str:
    return "".join(f'<math display="block">{line}</math>' for line in lines)


@dataclass(frozen=True)
class Block:
    """One row of the page. `names` are "file:definition"; the same names are looked up on both sides unless they
    differ.
    """

    title: str
    equation: str
    difference: str  # what differs between the two columns, and why
    jax: tuple[str, ...] = ()
    torch: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()  # from llm_common: one column, because both sides use it


BLOCKS = (
    Block(
        "Tokenizer",
        math(
            mrow(sub("p", "*"), "=", "arg max", "<mspace width='0.3em'/>", sub("count", "p"), ","),
            mrow(sub("p", "*"), "= ( a , b ) → a b"),
        ),
        "Neither framework has a part in it, so it is written once: a tokenizer on each side could differ, and would "
        "look "
        "like a difference of the models. Merging the most frequent pair, over and over, is the whole of training.",
        shared=(
            "text/bpe_reference:train",
            "text/bpe_reference:encode",
            "text/tokenizer:Tokenizer.encode",
            "text/bpe_words:WordEncoder._merge_short",
        ),
    ),
    Block(
        "Embedding",
        math(mrow(sub("x", "t"), "=", sub("W", sub("id", "t")))),
        "The function is the same. The Linen module declares its weight and gets it passed in at every call; the torch "
        "module owns it. JAX would clamp an id that is out of range, torch raises: so the host checks ids before "
        "either.",
        jax=("layers:embedding", "layers:Embedding"),
        torch=("layers:embedding", "layers:Embedding"),
    ),
    Block(
        "RMSNorm",
        math(mrow("y =", frac("x", root(mrow(frac("1", "D"), "Σ", sub("x", "i"), sup("", "2"), "+ ε"))), "⊙ w")),
        "The same four operations, in the same precision: statistics in float32, rounded, then the gain.",
        jax=("layers:rms_norm", "layers:RMSNorm"),
        torch=("layers:rms_norm", "layers:RMSNorm"),
    ),
    Block(
        "Rotary position embedding",
        math(
            mrow(sub("y", "i"), "=", sub("x", "i"), "cos θ −", sub("x", "i + H/2"), "sin θ"),
            mrow(sub("y", "i + H/2"), "=", sub("x", "i + H/2"), "cos θ +", sub("x", "i"), "sin θ"),
            mrow("θ = t ·", sup("10000", "− 2 i / H")),
        ),
        "The angles are computed once, in NumPy float64, for both. JAX makes a constant of the table while tracing; "
        "the "
        "torch model holds it as an object and casts it for each device. Two tables made in float32 would differ.",
        jax=("rope:rotary_table", "rope:apply_rope"),
        torch=("rope:RotaryTable", "rope:apply_rope"),
    ),
    Block(
        "Attention",
        math(
            mrow("P = softmax", "<mo>(</mo>", frac(mrow("Q", sup("K", "T")), root("H")), "+ mask", "<mo>)</mo>"),
            mrow("out = P V"),
        ),
        "The einsum strings are the same. The cache is where the styles part: in JAX it is a value, goes in and "
        "comes out "
        "again with one more position, and the mask hides its empty slots; in torch it is an object that is written "
        "in place.",
        jax=("attention:reference_attention", "attention:Attention"),
        torch=("attention:reference_attention", "attention:Attention"),
    ),
    Block(
        "KV cache",
        math(mrow("K ← [ K ;", sub("k", "t"), "] ,", "V ← [ V ;", sub("v", "t"), "]")),
        "A pure function cannot write to its argument: it returns an updated copy, which the compiler makes in "
        "place. An "
        "object simply writes. One has a fixed shape for the compiler, the other a view of the slots in use.",
        jax=("kv_cache:init_cache", "kv_cache:update"),
        torch=("kv_cache:KVCache.__init__", "kv_cache:KVCache.update"),
    ),
    Block(
        "SwiGLU",
        math(mrow("y =", sub("W", "down"), "( silu (", sub("W", "gate"), "x ) ⊙", sub("W", "up"), "x )")),
        "In Linen the submodules are named where they are called; in torch they are made in the constructor. The "
        "product "
        "is taken in float32 on both sides: the frameworks' own bfloat16 silu differ in a third of all elements.",
        jax=("layers:swiglu", "layers:MLP"),
        torch=("layers:swiglu", "layers:MLP"),
    ),
    Block(
        "Decoder layer",
        math(mrow("h = x + attention ( norm ( x ) )"), mrow("y = h + mlp ( norm ( h ) )")),
        "torch registers the parts as attributes and calls them. The JAX layer also returns the cache that it was "
        "given.",
        jax=("model:DecoderLayer",),
        torch=("model:DecoderLayer",),
    ),
    Block(
        "Loss",
        math(
            mrow(
                "L = −",
                frac("1", "n"),
                "Σ log softmax",
                "<mo>(</mo>",
                sub("z", "t"),
                "<mo>)</mo>",
                "[",
                sub("id", "t + 1"),
                "]",
            )
        ),
        "JAX has no ignore_index: the targets that do not count are masked by hand, and a safe index is looked up "
        "for them.",
        jax=("loss:cross_entropy_sum", "loss:cross_entropy"),
        torch=("loss:cross_entropy_sum", "loss:cross_entropy"),
    ),
    Block(
        "Clip and AdamW",
        math(
            mrow("g ← g min ( 1 , c / ‖ g ‖ )"),
            mrow("m ←", sub("β", "1"), "m + ( 1 −", sub("β", "1"), ") g"),
            mrow("v ←", sub("β", "2"), "v + ( 1 −", sub("β", "2"), ")", sup("g", "2")),
            mrow("p ← p − η", "<mo>(</mo>", frac(hat("m"), mrow(root(hat("v")), "+ ε")), "+ λ p", "<mo>)</mo>"),
        ),
        "An optax transformation is a pair of functions: state comes in, state and updates go out, and somebody else "
        "adds "
        "the updates. A torch optimizer owns its state and changes the parameters where they are.",
        jax=("optim:clip_factor", "optim:clip", "optim:adamw"),
        torch=("optim:clip_factor", "optim:adamw_update", "optim:AdamW"),
    ),
    Block(
        "Training step",
        math(
            mrow("g = ∇ L ( p )"),
            mrow("( p , m , v ) ← AdamW ( clip ( g ) )"),
        ),
        "JAX: a function from state and batch to a new state, compiled as a whole; a skipped update is a choice "
        "between two "
        "values. torch: a method that changes its object; a skipped update is an if.",
        jax=("engine/gradients:loss_and_grads", "engine/train:make_train_step"),
        torch=("engine/gradients:loss_and_grads", "engine/train:Trainer.train_step"),
    ),
    Block(
        "Sampling",
        math(
            mrow("id = arg max", "<mo>(</mo>", frac("z", "T"), "− log ( − log u )", "<mo>)</mo>"),
            mrow("u = threefry ( seed , row , position )"),
        ),
        "Random numbers have no hidden state on either side: they are a function of seed, row and position, so the "
        "same "
        "seed draws the same token in both frameworks. A stable sort makes ties fall the same way.",
        jax=("sampling:filter_logits", "sampling:gumbel_noise", "sampling:sample"),
        torch=("sampling:filter_logits", "sampling:gumbel_noise", "sampling:sample"),
    ),
    Block(
        "Generation",
        math(mrow(sub("id", "t + 1"), "= sample ( model (", sub("id", "0"), "…", sub("id", "t"), ") )")),
        "Prompts of different lengths are padded on the right; each text has a length of its own in the cache. JAX "
        "compiles a "
        "loop over several tokens to one program, whose state holds the cache. torch draws in a Python loop; in both "
        "the host "
        "then looks at the new tokens: it gives them out, and decides which texts have ended.",
        jax=("engine/decoding:decode_step", "engine/decoding:decode", "engine/generate:generate_stream"),
        torch=("engine/decoding:decode_step", "engine/generate:generate_stream"),
    ),
)


STYLE = """
:root { color-scheme: light; --ink: #1c1f24; --muted: #5c6470; --line: #dfe3e8; --card: #ffffff; --page: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 1880px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 30px; margin: 0 0 8px; }
header p, .difference { max-width: 95ch; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 6px; margin: 18px 0 8px; }
nav a { border: 1px solid var(--line); background: var(--card); border-radius: 999px; padding: 2px 12px;
  font-size: 14px; color: inherit; text-decoration: none; }
nav a:hover { border-color: var(--muted); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 22px 0; padding: 8px 22px 18px; }
h2 { font-size: 21px; margin: 12px 0 4px; }
.row { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 18px; align-items: start; }
.equation { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 4px 48px; overflow-x: auto; }
math { margin: 8px 0; font-size: 1.15em; }
.wide { grid-column: 1 / -1; }
.name { font: 600 13px/1.4 ui-monospace, monospace; color: var(--muted); margin: 12px 0 4px; }
.name b { color: var(--ink); }
.code { border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px; }
.code pre { margin: 0; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.code .sd, .code .c1 { color: #64748b; font-style: italic; }
footer { color: var(--muted); padding-bottom: 40px; font-size: 14px; }
@media (max-width: 1100px) { .row { grid-template-columns: 1fr; } }
"""


def source(package: str, name: str) -> tuple[str, str]:
    """Path and source text of "file:definition" or "file:Class.method" in a package."""
    file, _, qualified = name.partition(":")
    path = ROOT / package / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in qualified.split("."):
        found = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if not found:
            raise KeyError(f"{path}: no definition {qualified!r}; mend the list in llm_tools/side_by_side.py")
        node = found[0]
        body = found[0].body
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return f"{package}/{file}.py", "\n".join(line[indent:] for line in lines)


def cell(label: str, package: str, name: str, css: str = "") -> str:
    path, text = source(package, name)
    code = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True))
    title = f'<div class="name"><b>{label}</b> · {path}</div>'
    return f'<div class="{css}">{title}<div class="code"><pre>{code}</pre></div></div>'


def cells(block: Block) -> str:
    """The code of a block, definition beside definition."""
    parts = [cell("both", "llm_common", name, "wide") for name in block.shared]
    for jax, torch in itertools.zip_longest(block.jax, block.torch):
        parts.append(cell("JAX", "jax_llm", jax) if jax else "<div></div>")
        parts.append(cell("PyTorch", "torch_llm", torch) if torch else "<div></div>")
    return "".join(parts)


def render() -> str:
    """The whole page, a pure function of the source files."""
    sections = []
    for block in BLOCKS:
        anchor = block.title.lower().replace(" ", "-")
        sections.append(
            f'<section id="{anchor}"><h2>{block.title}</h2><p class="difference">{html.escape(block.difference)}</p>'
            f'<div class="row"><div class="equation">{block.equation}</div>{cells(block)}</div></section>'
        )
    links = "".join(f'<a href="#{b.title.lower().replace(" ", "-")}">{b.title}</a>' for b in BLOCKS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One model, written twice</title>
<style>{HtmlFormatter(style="xcode").get_style_defs(".code")}{STYLE}</style>
</head>
<body>
<header>
<h1>One model, written twice</h1>
<p>The same language model as pure functions (JAX, Flax Linen, optax) and as objects (PyTorch). Each row is a building block:
its equation, and the source of both sides as it runs. B batch, T query positions, S key positions, D hidden size, N query
heads, K key/value heads, G = N / K, H head size, F intermediate size, V vocabulary, L layers.</p>
<nav>{links}</nav>
</header>
<main>{"".join(sections)}</main>
<footer>Made from the source by scripts/side_by_side.py.</footer>
</body>
</html>
"""
