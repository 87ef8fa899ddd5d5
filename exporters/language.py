"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 as ONNX, with a cache of keys and values: one graph, or a graph for each part.

One graph has the names of optimum. Inputs: input_ids and position_ids (batch, sequence), attention_mask (batch, past +
sequence), all int64, and past_key_values.N.key and .value (batch, kv_heads, past, head_dim) of each layer; outputs:
logits (batch, sequence, vocab_size) and present.N.key and .value. The first call has a past of length 0. Adapters stay
beside their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgetrain.adapters import lora_targets
from edgetrain.architectures import inverse_frequencies, stores_transposed, target_tensors
from edgetrain.spec import LanguageModelSpec, Spec
from edgetrain.stages import rows_of_chunk
from exporters.graph import Graph
from exporters.manifest import EMBEDDING, NORM, layer_file, logits_file

Shapes = Mapping[str, Sequence[int]]
"""{STAGE.TENSOR: shape}"""

_FLOAT, _BOOL = 1, 9  # of onnx.TensorProto
_TOKENS = ("batch", "sequence")
_TOTAL = "past + sequence"
_GELU = {"gelu_new": "tanh", "gelu": "none"}


def table_of(model: LanguageModelSpec) -> str:
    """The weight that logits are taken with."""
    return "embedding.weight" if model.tied else "output.weight"


def chunks_of_table(model: LanguageModelSpec) -> dict[str, tuple[int, int]]:
    """{name of some rows of the output table: (first row, rows)}, in order."""
    rows = rows_of_chunk(model.width)
    starts = range(0, model.vocab_size, rows)
    return {f"{table_of(model)}[{start}:]": (start, min(rows, model.vocab_size - start)) for start in starts}


def whole_model(spec: Spec, shapes: Shapes) -> Graph:
    """The model as one graph."""
    graph = Graph("language_model", shapes)
    model = _Model(graph, spec, shapes)
    ids, positions = model.tokens()
    mask = model.attention_mask()
    pasts = [model.past(f"past_key_values.{number}.") for number in range(spec.model.depth)]
    hidden = model.embedded(ids, positions)
    model.look(hidden, mask, positions)
    for number, (key, value) in enumerate(pasts):
        hidden, *present = model.layer(number, hidden, key, value)
        model.present(f"present.{number}.", *present)
    graph.result("logits", model.logits(model.normed(hidden)), *_TOKENS, spec.language.vocab_size)
    return graph


def parts(spec: Spec, shapes: Shapes) -> Iterator[tuple[str, Graph]]:
    """(file, graph) of the embedding, each layer, the last norm, and some rows at a time of the output table.

    A layer has the inputs inputs_embeds, attention_mask, position_ids, past.key and past.value, and the outputs hidden,
    present.key and present.value.
    """
    width = spec.language.width

    def begin(name: str) -> _Model:
        return _Model(Graph(name.removesuffix(".onnx"), shapes), spec, shapes)

    model = begin(EMBEDDING)
    model.graph.result("hidden", model.embedded(*model.tokens()), *_TOKENS, width)
    yield EMBEDDING, model.graph
    for number in range(spec.model.depth):
        model = begin(layer_file(number))
        hidden = model.graph.tensor("inputs_embeds", "float32", *_TOKENS, width)
        mask, positions = model.attention_mask(), model.graph.tensor("position_ids", "int64", *_TOKENS)
        key, value = model.past("past.")
        model.look(hidden, mask, positions)
        hidden, *present = model.layer(number, hidden, key, value)
        model.present("present.", *present)
        model.graph.result("hidden", hidden, *_TOKENS, width)
        yield layer_file(number), model.graph
    model = begin(NORM)
    hidden = model.graph.tensor("inputs_embeds", "float32", *_TOKENS, width)
    model.graph.result("hidden", model.normed(hidden), *_TOKENS, width)
    yield NORM, model.graph
    for chunk, (name, (_, rows)) in enumerate(chunks_of_table(spec.language).items()):
        model = begin(logits_file(chunk))
        hidden = model.graph.tensor("inputs_embeds", "float32", *_TOKENS, width)
        model.graph.result("logits", model.logits(hidden, name, rows), *_TOKENS, rows)
        yield logits_file(chunk), model.graph


class _Model:
    """Adds a language model to a graph. Linear maps are on (batch * sequence, width), everything between on
    (batch, sequence, ...)."""

    def __init__(self, graph: Graph, spec: Spec, shapes: Shapes) -> None:
        self.graph, self.spec, self.model, self.shapes = graph, spec, spec.language, shapes
        self.transposed = stores_transposed(self.model)
        self.adapted = (
            {tensor for target in lora_targets(spec) for tensor in target_tensors(self.model, target)}
            if spec.exact.train == "lora"
            else set()
        )
        self.sizes = ""  # (batch, sequence)

    def tokens(self) -> tuple[str, str]:
        """The inputs input_ids and position_ids."""
        return self.graph.tensor("input_ids", "int64", *_TOKENS), self.graph.tensor("position_ids", "int64", *_TOKENS)

    def attention_mask(self) -> str:
        """The input of that name."""
        return self.graph.tensor("attention_mask", "int64", "batch", _TOTAL)

    def past(self, prefix: str) -> tuple[str, str]:
        """The inputs of keys and values."""
        dims = ("batch", self.model.kv_heads, "past", self.model.head_dim)
        key, value = (self.graph.tensor(f"{prefix}{name}", "float32", *dims) for name in ("key", "value"))
        return key, value

    def present(self, prefix: str, key: str, value: str) -> None:
        """The outputs of keys and values."""
        for name, present in (("key", key), ("value", value)):
            self.graph.result(
                f"{prefix}{name}", present, "batch", self.model.kv_heads, _TOTAL, self.model.head_dim
            )  # fmt: skip

    def embedded(self, ids: str, positions: str) -> str:
        """(batch, sequence, width)."""
        g = self.graph
        hidden = g.op("Gather", g.weight("embedding.weight"), ids)
        if self.model.family == "gpt2":
            hidden = g.op("Add", hidden, g.op("Gather", g.weight("stem.wpe.weight"), positions))
        return hidden

    def look(self, hidden: str, mask: str, positions: str) -> None:
        """What all layers have in common: the angles, and which token sees which."""
        self._measure(hidden)
        if self.model.family != "gpt2":
            self._tables(positions)
        self._mask(mask)

    def _measure(self, hidden: str) -> None:
        self.sizes = self.graph.op("Shape", hidden, start=0, end=2)

    def normed(self, hidden: str) -> str:
        """(batch, sequence, width)."""
        with self.graph.scope("head"):
            return self._norm(hidden, "head.ln_f" if self.model.family == "gpt2" else "head.norm")

    def logits(self, normed: str, table: str = "", rows: int = 0) -> str:
        """(batch, sequence, vocab_size), or of some rows of the table."""
        g, model = self.graph, self.model
        with g.scope("head"):
            if not self.sizes:
                self._measure(normed)
            weight = g.weight(table or table_of(model))
            flat = g.op("Gemm", g.reshape(normed, -1, model.width), weight, transB=1)
            return self._rows(flat, rows or model.vocab_size)

    def _rows(self, flat: str, *shape: int) -> str:
        """(batch * sequence, ...) -> (batch, sequence, *shape)."""
        g = self.graph
        return g.op("Reshape", flat, g.op("Concat", self.sizes, g.ints(*shape), axis=0))

    def _tables(self, positions: str) -> None:
        """cos and sin of the angles, each (batch, sequence, 1, head_dim / 2)."""
        g = self.graph
        places = g.op("Unsqueeze", g.op("Cast", positions, to=_FLOAT), g.ints(2))
        angles = g.op("Mul", places, g.floats(inverse_frequencies(self.model), "inverse_frequencies"))
        self.cos, self.sin = (g.op("Unsqueeze", g.op(kind, angles), g.ints(2)) for kind in ("Cos", "Sin"))

    def _mask(self, mask: str) -> None:
        """What is added to scores, (batch, 1, 1, sequence, past + sequence): 0 where a token sees another one."""
        g = self.graph
        total = g.op("Squeeze", g.op("Shape", mask, start=1, end=2), g.ints(0))
        length = g.op("Squeeze", g.op("Gather", self.sizes, g.ints(1)), g.ints(0))
        keys = g.op("Unsqueeze", g.op("Range", g.number(0), total, g.number(1)), g.ints(0))  # (1, past + sequence)
        queries = g.op("Range", g.op("Sub", total, length), total, g.number(1))
        queries = g.op("Unsqueeze", queries, g.ints(1))  # (sequence, 1)
        sees = g.op("LessOrEqual", keys, queries)
        if self.model.sliding_window:
            last = g.op("Sub", queries, g.number(self.model.sliding_window))
            sees = g.op("And", sees, g.op("Greater", keys, last))
        given = g.op("Unsqueeze", g.op("Cast", mask, to=_BOOL), g.ints(1))  # (batch, 1, past + sequence)
        sees = g.op("And", sees, given)
        bias = g.op("Where", sees, g.floats(0.0), g.floats(np.finfo(np.float32).min))
        self.bias = g.op("Unsqueeze", bias, g.ints(1, 2))

    def layer(self, number: int, hidden: str, key: str, value: str) -> tuple[str, str, str]:
        """hidden (batch, sequence, width), past keys and values -> the same, with those of the sequence."""
        with self.graph.scope(f"layer{number:03d}"):
            return self._layer(f"layer{number:03d}", hidden, key, value)

    def _layer(self, stage: str, hidden: str, key: str, value: str) -> tuple[str, str, str]:
        g, model = self.graph, self.model
        if model.family == "gpt2":
            normed = g.reshape(self._norm(hidden, f"{stage}.ln_1"), -1, model.width)
            q, k, v = g.split(self._linear(normed, stage, "attn.c_attn"), 3, 1)
            mixed, key, value = self._attention(q, k, v, key, value)
            hidden = g.op("Add", hidden, self._rows(self._linear(mixed, stage, "attn.c_proj"), model.width))
            normed = g.reshape(self._norm(hidden, f"{stage}.ln_2"), -1, model.width)
            inner = g.op("Gelu", self._linear(normed, stage, "mlp.c_fc"), approximate=_GELU[model.activation])
            out = self._linear(inner, stage, "mlp.c_proj")
        else:
            normed = g.reshape(self._norm(hidden, f"{stage}.input_layernorm"), -1, model.width)
            q, k, v = (self._linear(normed, stage, f"self_attn.{name}_proj") for name in "qkv")
            mixed, key, value = self._attention(q, k, v, key, value, stage)
            hidden = g.op("Add", hidden, self._rows(self._linear(mixed, stage, "self_attn.o_proj"), model.width))
            normed = g.reshape(self._norm(hidden, f"{stage}.post_attention_layernorm"), -1, model.width)
            gate, up = (self._linear(normed, stage, f"mlp.{name}_proj") for name in ("gate", "up"))
            gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
            out = self._linear(gated, stage, "mlp.down_proj")
        return g.op("Add", hidden, self._rows(out, model.width)), key, value

    def _attention(  # noqa: PLR0917
        self, q: str, k: str, v: str, key: str, value: str, stage: str = ""
    ) -> tuple[str, str, str]:
        """q, k, v (batch * sequence, heads * head_dim) -> (batch * sequence, heads * head_dim), keys and values."""
        g, model = self.graph, self.model
        q = self._rows(q, model.heads, model.head_dim)
        k, v = (self._rows(one, model.kv_heads, model.head_dim) for one in (k, v))
        if model.qk_norm:
            q, k = self._norm(q, f"{stage}.self_attn.q_norm"), self._norm(k, f"{stage}.self_attn.k_norm")
        if model.family != "gpt2":
            q, k = self._rotated(q), self._rotated(k)
        q, k, v = (g.op("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, k, v))
        key, value = g.op("Concat", key, k, axis=2), g.op("Concat", value, v, axis=2)
        # Heads that share keys: (batch, kv_heads, group, sequence, head_dim). A 0 keeps what there is.
        group = model.heads // model.kv_heads
        q = g.reshape(g.op("Mul", q, g.floats(model.head_dim**-0.5)), 0, model.kv_heads, group, -1, model.head_dim)
        scores = g.op("MatMul", q, g.op("Unsqueeze", g.op("Transpose", key, perm=[0, 1, 3, 2]), g.ints(2)))
        p = g.op("Softmax", g.op("Add", scores, self.bias), axis=-1)
        mixed = g.op("MatMul", p, g.op("Unsqueeze", value, g.ints(2)))
        mixed = g.op("Transpose", g.reshape(mixed, 0, model.heads, -1, model.head_dim), perm=[0, 2, 1, 3])
        return g.reshape(mixed, -1, model.heads * model.head_dim), key, value

    def _rotated(self, x: str) -> str:
        """(batch, sequence, heads, head_dim); element i is paired with i + head_dim / 2."""
        g = self.graph
        a, b = g.split(x, 2, 3)
        first = g.op("Sub", g.op("Mul", a, self.cos), g.op("Mul", b, self.sin))
        second = g.op("Add", g.op("Mul", b, self.cos), g.op("Mul", a, self.sin))
        return g.op("Concat", first, second, axis=3)

    def _norm(self, x: str, name: str) -> str:
        """Over the last axis: by the root mean square, or GPT-2's layer norm."""
        g, weight = self.graph, self.graph.weight(f"{name}.weight")
        if self.model.family == "gpt2":
            bias = g.weight(f"{name}.bias")
            return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.model.norm_eps)
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.floats(self.model.norm_eps)))
        return g.op("Mul", g.op("Div", x, root), weight)

    def _linear(self, x: str, stage: str, name: str) -> str:
        """x (n, in) -> (n, out), with its adapter if it has one."""
        g, weight, bias = self.graph, f"{stage}.{name}.weight", f"{stage}.{name}.bias"
        inputs = [x, g.weight(weight), *([g.weight(bias)] if bias in self.shapes else [])]
        y = g.op("Gemm", *inputs, transB=int(not self.transposed))
        if f"{name}.weight" not in self.adapted:
            return y
        exact = self.spec.exact
        low = g.op("Gemm", x, g.weight(f"{stage}.lora.{name}.lora_A.weight"), transB=1)
        added = g.weight(f"{stage}.lora.{name}.lora_B.weight")
        return g.op("Gemm", low, added, y, transB=1, alpha=exact.alpha / exact.rank)
