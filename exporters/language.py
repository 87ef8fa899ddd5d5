"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 as ONNX, with a cache of keys and values: one graph, or a graph for each part.

One graph has the names of optimum. Inputs: input_ids and position_ids (batch, sequence), attention_mask (batch, past +
sequence), all int64, and past_key_values.N.key and .value (batch, kv_heads, past, head_dim) of each layer; outputs:
logits (batch, sequence, vocab_size) and present.N.key and .value. The first call has a past of length 0. Adapters stay
beside their weights, unless they were merged.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgetrain.architectures import stores_transposed
from edgetrain.spec import LanguageModelSpec, Spec
from edgetrain.stages import rows_of_chunk
from exporters.graph import Graph, Storage
from exporters.manifest import EMBEDDING, NORM, layer_file, logits_file
from exporters.sequences import TOKENS, Sequences, Shapes

_GELU = {"gelu_new": "tanh", "gelu": "none"}


def table_of(model: LanguageModelSpec) -> str:
    """The weight that logits are taken with."""
    return "embedding.weight" if model.tied else "output.weight"


def chunks_of_table(model: LanguageModelSpec) -> dict[str, tuple[int, int]]:
    """{name of some rows of the output table: (first row, rows)}, in order."""
    rows = rows_of_chunk(model.width)
    starts = range(0, model.vocab_size, rows)
    return {f"{table_of(model)}[{start}:]": (start, min(rows, model.vocab_size - start)) for start in starts}


def whole_model(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """The model as one graph."""
    graph = Graph("language_model", shapes, storage)
    model = _Model(graph, spec, shapes)
    ids, positions = model.input_ids(), model.position_ids()
    mask = model.attention_mask()
    pasts = [model.past(f"past_key_values.{number}.", spec.language) for number in range(spec.model.depth)]
    hidden = model.embedded(ids, positions)
    model.look(hidden, mask, positions)
    for number, (key, value) in enumerate(pasts):
        hidden, *present = model.layer(number, hidden, key, value)
        model.present(f"present.{number}.", spec.language, *present)
    graph.result("logits", model.logits(model.normed(hidden)), *TOKENS, spec.language.vocab_size)
    return graph


def parts(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Iterator[tuple[str, Graph]]:
    """(file, graph) of the embedding, each layer, the last norm, and some rows at a time of the output table.

    A layer has the inputs inputs_embeds, attention_mask, position_ids, past.key and past.value, and the outputs hidden,
    present.key and present.value.
    """
    width = spec.language.width

    def begin(name: str) -> _Model:
        return _Model(Graph(name.removesuffix(".onnx"), shapes, storage), spec, shapes)

    model = begin(EMBEDDING)
    model.graph.result("hidden", model.embedded(model.input_ids(), model.position_ids()), *TOKENS, width)
    yield EMBEDDING, model.graph
    for number in range(spec.model.depth):
        model = begin(layer_file(number))
        hidden = model.graph.tensor("inputs_embeds", "float32", *TOKENS, width)
        mask, positions = model.attention_mask(), model.position_ids()
        key, value = model.past("past.", spec.language)
        model.look(hidden, mask, positions)
        hidden, *present = model.layer(number, hidden, key, value)
        model.present("present.", spec.language, *present)
        model.graph.result("hidden", hidden, *TOKENS, width)
        yield layer_file(number), model.graph
    model = begin(NORM)
    hidden = model.graph.tensor("inputs_embeds", "float32", *TOKENS, width)
    model.graph.result("hidden", model.normed(hidden), *TOKENS, width)
    yield NORM, model.graph
    for chunk, (name, (_, rows)) in enumerate(chunks_of_table(spec.language).items()):
        model = begin(logits_file(chunk))
        hidden = model.graph.tensor("inputs_embeds", "float32", *TOKENS, width)
        model.graph.result("logits", model.logits(hidden, name, rows), *TOKENS, rows)
        yield logits_file(chunk), model.graph


class _Model(Sequences):
    """Adds a language model to a graph."""

    def __init__(self, graph: Graph, spec: Spec, shapes: Shapes) -> None:
        super().__init__(graph)
        self.spec, self.model, self.shapes = spec, spec.language, shapes
        self.transposed = stores_transposed(self.model)

    def embedded(self, ids: str, positions: str) -> str:
        """(batch, sequence, width)."""
        g = self.graph
        hidden = g.rows("embedding.weight", ids)
        if self.model.family == "gpt2":
            hidden = g.op("Add", hidden, g.rows("stem.wpe.weight", positions))
        return hidden

    def look(self, hidden: str, mask: str, positions: str) -> None:
        """What all layers have in common: the angles, and which token sees which."""
        self.measure(hidden)
        if self.model.family != "gpt2":
            self.turn_by(positions, self.model)
        self.see(mask, self.model.sliding_window)

    def normed(self, hidden: str) -> str:
        """(batch, sequence, width)."""
        with self.graph.scope("head"):
            return self._norm(hidden, "head.ln_f" if self.model.family == "gpt2" else "head.norm")

    def logits(self, normed: str, table: str = "", rows: int = 0) -> str:
        """(batch, sequence, vocab_size), or of some rows of the table."""
        g, model = self.graph, self.model
        with g.scope("head"):
            if not self.sizes:
                self.measure(normed)
            flat = g.gemm(g.reshape(normed, -1, model.width), table or table_of(model))
            return self.rows(flat, rows or model.vocab_size)

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
            hidden = g.op("Add", hidden, self.rows(self._linear(mixed, stage, "attn.c_proj"), model.width))
            normed = g.reshape(self._norm(hidden, f"{stage}.ln_2"), -1, model.width)
            inner = g.op("Gelu", self._linear(normed, stage, "mlp.c_fc"), approximate=_GELU[model.activation])
            out = self._linear(inner, stage, "mlp.c_proj")
        else:
            normed = g.reshape(self._norm(hidden, f"{stage}.input_layernorm"), -1, model.width)
            q, k, v = (self._linear(normed, stage, f"self_attn.{name}_proj") for name in "qkv")
            mixed, key, value = self._attention(q, k, v, key, value, stage)
            hidden = g.op("Add", hidden, self.rows(self._linear(mixed, stage, "self_attn.o_proj"), model.width))
            normed = g.reshape(self._norm(hidden, f"{stage}.post_attention_layernorm"), -1, model.width)
            gate, up = (self._linear(normed, stage, f"mlp.{name}_proj") for name in ("gate", "up"))
            gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
            out = self._linear(gated, stage, "mlp.down_proj")
        return g.op("Add", hidden, self.rows(out, model.width)), key, value

    def _attention(  # noqa: PLR0917
        self, q: str, k: str, v: str, key: str, value: str, stage: str = ""
    ) -> tuple[str, str, str]:
        """q, k, v (batch * sequence, heads * head_dim) -> (batch * sequence, heads * head_dim), keys and values."""
        g, model = self.graph, self.model
        q = self.rows(q, model.heads, model.head_dim)
        k, v = (self.rows(one, model.kv_heads, model.head_dim) for one in (k, v))
        if model.qk_norm:
            q, k = self._norm(q, f"{stage}.self_attn.q_norm"), self._norm(k, f"{stage}.self_attn.k_norm")
        if model.family != "gpt2":
            q, k = self.rotated(q), self.rotated(k)
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
        y = g.gemm(x, weight, bias if bias in self.shapes else "", channels=int(self.transposed), coarse=True)
        if f"{stage}.lora.{name}.lora_A.weight" not in self.shapes:
            return y
        exact = self.spec.exact
        low = g.op("Gemm", x, g.weight(f"{stage}.lora.{name}.lora_A.weight"), transB=1)
        added = g.weight(f"{stage}.lora.{name}.lora_B.weight")
        return g.op("Gemm", low, added, y, transB=1, alpha=exact.alpha / exact.rank)
