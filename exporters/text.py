"""The language models that are trained from the beginning as ONNX graphs: ``edgetrain.models.text`` and its families.

A graph for each block; of a model trained as a whole there is one. All lengths and batch sizes may vary:
- masked: input_ids (some of them ``vocab_size``, the mask) and t (batch,) -> logits;
- ar by blocks: input_ids, position_ids, attention_mask, past_key_values.N.key and .value of the block's layers, and of
  the tokens that follow z (batch, sequence, width) at sigma (batch,) -> logits, denoised (the D of the Euler step), and
  present.N.key and .value. With one stream these hold for the sigma with which they were made;
- ar as a whole: the same without z, sigma and denoised, as other language models;
- recurrent by blocks: input_ids, z, sigma -> logits, denoised;
- recurrent as a whole: input_ids, the state that the core begins with (batch, sequence, width) and how often it runs,
  ``loops`` -> logits.
"""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.noise import masking_band
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.stages import stages_of_block
from exporters.graph import Graph, Storage
from exporters.noised import NoisedRows, clean_condition, embedded_noise, silu
from exporters.sequences import TOKENS, Sequences, Shapes

_EPS = 1e-6
_TIME_SCALE = 1.5  # of masked diffusion

KeyValue = tuple[str, str]
"""Keys and values, each (batch, heads, tokens, head_dim)."""


def block_graph(spec: Spec, block: int, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """The graph of one block, or of a model trained as a whole."""
    graph = Graph(f"block{block:02d}", shapes, storage)
    makers: dict[str, Callable[[Graph, Spec, int], None]] = {
        "masked": _masked, "ar": _whole_ar if spec.is_exact else _ar,
        "recurrent": _whole_recurrent if spec.is_exact else _recurrent,
    }  # fmt: skip
    makers[spec.model.family](graph, spec, block)
    return graph


def single_graph(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """One graph that a program runs without knowing the method.

    masked: that of all blocks, the one that owns t is run; t (1,) is that of all texts. Next-token models by blocks:
    block 0 at sigma_max, where z carries nothing, from z = 0; of ar with the inputs and outputs of other language
    models. Trained as a whole: ``block_graph``.
    """
    if spec.is_exact:
        return block_graph(spec, 0, shapes, storage)
    graph = Graph("model", shapes, storage)
    makers = {"masked": _all_masked, "ar": _ar_at_sigma_max, "recurrent": _recurrent_at_sigma_max}
    makers[spec.model.family](graph, spec)
    return graph


def loss(spec: Spec, block: int, shapes: Shapes) -> Graph:
    """What training a block makes small, to be differentiated: input_ids, t (batch,) or z (batch, sequence, width) at
    sigma (batch,), targets (batch, sequence) int64, what each counts (batch, sequence), and all weights -> "loss", a
    scalar: the weighted sum of the cross-entropies."""
    graph, model = Graph(f"loss{block:02d}", shapes, trains=True), spec.text_model
    text = _Text(graph, spec, block)
    ids = text.input_ids()
    if model.family == "masked":
        logits = text.unmask(ids, graph.tensor("t", "float32", "batch"))
    else:
        z, sigma = graph.tensor("z", "float32", *TOKENS, model.width), graph.tensor("sigma", "float32", "batch")
        if model.family == "recurrent":
            logits, _ = text.denoise_state(ids, z, sigma)
        else:
            text.begin_whole(ids)
            logits, _ = text.denoise_beside(ids, None, z, sigma)
    labels = graph.reshape(graph.tensor("targets", "int64", *TOKENS), -1)
    weights = graph.reshape(graph.tensor("weights", "float32", *TOKENS), -1)
    graph.result("loss", graph.cross_entropy(graph.reshape(logits, -1, model.vocab_size), labels, weights))
    return graph


def llama_config(model: TextModelSpec, num_layers: int, length: int) -> dict[str, object]:
    """What loaders read to find their way: to them the graph of an ar model is one of Llama, whose inputs it has."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": model.vocab_size,
        "hidden_size": model.width, "intermediate_size": model.mlp_ratio * model.width,
        "num_hidden_layers": num_layers, "num_attention_heads": model.heads, "num_key_value_heads": model.heads,
        "head_dim": model.head_dim, "max_position_embeddings": length, "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
    }  # fmt: skip


def is_cached(spec: Spec) -> bool:
    """Whether graphs of blocks, or of the whole, have past keys and values."""
    return spec.model.family == "ar"


def _masked(graph: Graph, spec: Spec, block: int) -> None:
    text = _Text(graph, spec, block)
    graph.result("logits", text.unmask(text.input_ids(), graph.tensor("t", "float32", "batch")), *text.logits_dims)


def _all_masked(graph: Graph, spec: Spec) -> None:
    blocks = [_Text(graph, spec, block) for block in range(spec.num_blocks)]
    ids, t = blocks[0].input_ids(), graph.tensor("t", "float32", 1)
    for one in blocks:
        one.measure(ids)

    def is_before(block: int) -> str:
        low = graph.floats([masking_band(spec.num_blocks, block - 1)[0]])
        return graph.op("Squeeze", graph.op("Greater", t, low), graph.ints(0))

    def unmask(block: int) -> str:
        return blocks[block].unmask(ids, t)

    dims = blocks[0].logits_dims
    graph.result("logits", graph.choose_owner(0, spec.num_blocks, is_before, unmask, *dims), *dims)


def _whole_ar(graph: Graph, spec: Spec, block: int) -> None:
    text = _Text(graph, spec, block)
    ids, pasts = text.begin_cached()
    condition = clean_condition(graph, text.stem)
    clean = text.embedded(ids)
    for number, (layer, past) in enumerate(zip(text.layers, pasts, strict=True)):
        clean, seen = text.clean(layer, clean, condition, past)
        text.present(f"present.{number}.", text, *seen)
    graph.result("logits", text.logits(clean, condition), *text.logits_dims)


def _ar(graph: Graph, spec: Spec, block: int) -> None:
    text = _Text(graph, spec, block)
    ids, pasts = text.begin_cached(turns_beside=True)
    z, sigma = graph.tensor("z", "float32", *TOKENS, spec.text_model.width), graph.tensor("sigma", "float32", "batch")
    logits, denoised = text.denoise_beside(ids, pasts, z, sigma)
    graph.result("logits", logits, *text.logits_dims)
    graph.result("denoised", denoised, *TOKENS, spec.text_model.width)


def _ar_at_sigma_max(graph: Graph, spec: Spec) -> None:
    text = _Text(graph, spec, 0)
    ids, pasts = text.begin_cached(turns_beside=True)
    z, sigma = text.nothing(ids), graph.floats([spec.diffusion_blocks.noise.sigma_max])
    logits, _ = text.denoise_beside(ids, pasts, z, sigma)
    graph.result("logits", logits, *text.logits_dims)


def _recurrent(graph: Graph, spec: Spec, block: int) -> None:
    text, width = _Text(graph, spec, block), spec.text_model.width
    ids = text.input_ids()
    z, sigma = graph.tensor("z", "float32", *TOKENS, width), graph.tensor("sigma", "float32", "batch")
    logits, denoised = text.denoise_state(ids, z, sigma)
    graph.result("logits", logits, *text.logits_dims)
    graph.result("denoised", denoised, *TOKENS, width)


def _recurrent_at_sigma_max(graph: Graph, spec: Spec) -> None:
    text = _Text(graph, spec, 0)
    ids = text.input_ids()
    z, sigma = text.nothing(ids), graph.floats([spec.diffusion_blocks.noise.sigma_max])
    logits, _ = text.denoise_state(ids, z, sigma)
    graph.result("logits", logits, *text.logits_dims)


def _whole_recurrent(graph: Graph, spec: Spec, block: int) -> None:
    text, width = _Text(graph, spec, block), spec.text_model.width
    ids = text.input_ids()
    state, loops = graph.tensor("state", "float32", *TOKENS, width), graph.tensor("loops", "int64")
    injected, condition = text.prelude(ids), clean_condition(graph, text.stem)

    def core(given: str, _: str) -> str:
        return text.core(given, injected, condition)

    state = graph.loop(loops, state, core, *TOKENS, width)
    graph.result("logits", text.read_state(state, condition), *text.logits_dims)


class _Text(Sequences):
    """Adds the stages of one block to a graph."""

    def __init__(self, graph: Graph, spec: Spec, block: int) -> None:
        super().__init__(graph)
        self.spec, self.model = spec, spec.text_model
        stages = stages_of_block(spec, block)
        (self.stem,), (self.head,) = ([one.name for one in stages if one.kind == kind] for kind in ("stem", "head"))
        self.layers = [one.name for one in stages if one.kind == "layer"]
        self._codebook = next((one.name for one in stages if one.kind == "codebook"), "")
        self._adapter = next((one.name for one in stages if one.kind == "adapter"), "")
        self._block = block
        self._beside = ("", "")  # cos and sin one place further

    @property
    def kv_heads(self) -> int:
        return self.model.heads

    @property
    def head_dim(self) -> int:
        return self.model.head_dim

    @property
    def logits_dims(self) -> tuple[int | str, ...]:
        return (*TOKENS, self.model.vocab_size)

    # ------------------------------------------------------------------------------------------------------ families

    def unmask(self, ids: str, t: str) -> str:
        """ids (batch, sequence) at t (batch,) or (1,) -> logits."""
        g = self.graph
        self.measure(ids)
        self.turn_by(self.places(), self.model)
        c_noise = g.op("Mul", g.op("Sub", g.op("Mul", t, g.floats(2.0)), g.floats(1.0)), g.floats(_TIME_SCALE))
        with g.scope(self.stem):
            condition = silu(g, embedded_noise(g, self.stem, g.op("Unsqueeze", c_noise, g.ints(1))))
            tokens = self._with_neighbours(self.embedded(ids))
        for layer in self.layers:
            tokens = self._stream(layer, tokens, condition, lambda q, k, v: self._mixed(q, k, v, ""))
        return self.logits(tokens, condition)

    def denoise_beside(self, ids: str, pasts: list[KeyValue] | None, z: str, sigma: str) -> tuple[str, str]:
        """The noisy tokens z (batch, sequence, width) at sigma (batch,) or (1,), beside the clean ones -> logits,
        denoised. Where there are pasts, makes the outputs of keys and values."""
        g, method = self.graph, self.spec.diffusion_blocks
        noised = NoisedRows(g, self.spec, z, sigma, 3, self._codebook)
        with g.scope(self.stem):
            condition = silu(g, embedded_noise(g, self.stem, noised.c_noise))
            constant = clean_condition(g, self.stem) if method.streams == 2 else condition
            clean = self.embedded(ids)
            noisy = self.linear(noised.entering(), f"{self.stem}.noisy")
            if self.model.previous:
                noisy = g.op("Add", noisy, clean)
        for number, layer in enumerate(self.layers):
            with g.scope("clean"):
                clean, seen = self.clean(layer, clean, constant, pasts[number] if pasts else None)
            with g.scope("noisy"):
                noisy = self._noisy(layer, noisy, condition, seen)
            if pasts:
                self.present(f"present.{number}.", self, *seen)
        output = g.op("Add", noisy, clean) if method.joined else noisy
        logits = noised.with_evidence(self.logits(noised.read(output), condition))
        return logits, noised.mean(logits)

    def denoise_state(self, ids: str, z: str, sigma: str) -> tuple[str, str]:
        """ids, z (batch, sequence, width) at sigma (batch,) or (1,) -> logits, denoised."""
        g = self.graph
        injected = self.prelude(ids)
        noised = NoisedRows(g, self.spec, z, sigma, 3, self._codebook)
        condition = silu(g, embedded_noise(g, self.stem, noised.c_noise))
        state = self.core(noised.entering(), injected, condition)
        logits = self.read_state(state, condition, noised)
        return logits, noised.mean(logits)

    # --------------------------------------------------------------------------------------------------------- parts

    def begin_cached(self, turns_beside: bool = False) -> tuple[str, list[KeyValue]]:
        """The inputs of a model with past keys and values: input_ids, and the past of each layer."""
        ids, positions, mask = self.input_ids(), self.position_ids(), self.attention_mask()
        pasts = [self.past(f"past_key_values.{number}.", self) for number in range(len(self.layers))]
        self.measure(ids)
        self._turn(positions, turns_beside)
        self.see(mask)
        return ids, pasts

    def begin_whole(self, ids: str) -> None:
        """Without a past, for clean and noisy tokens beside each other."""
        self.measure(ids)
        self._turn(self.places(), True)
        self.see_before()

    def _turn(self, positions: str, turns_beside: bool) -> None:
        if turns_beside:
            self.turn_by(self.graph.op("Add", positions, self.graph.number(1)), self.model)
            self._beside = (self.cos, self.sin)
        self.turn_by(positions, self.model)

    def nothing(self, ids: str) -> str:
        """z = 0 for each of ids, (batch, sequence, width)."""
        g = self.graph
        shape = g.op("Concat", g.op("Shape", ids, start=0, end=2), g.ints(self.model.width), axis=0)
        return g.op("Expand", g.floats(0.0), shape)

    def embedded(self, ids: str) -> str:
        """(batch, sequence, width)."""
        return self.graph.rows(f"{self.stem}.tokens", ids)

    def _with_neighbours(self, embedded: str) -> str:
        """With what so many tokens on each side say of one, nothing beyond the ends."""
        g, reach = self.graph, self.model.neighbours
        if not reach:
            return embedded
        padded = g.op("Pad", embedded, g.ints(0, reach, 0, 0, reach, 0))
        length = g.op("Gather", self.sizes, g.ints(1))
        parts = [
            g.op("Slice", padded, g.ints(i), g.op("Add", length, g.ints(i)), g.ints(1))
            for i in range(2 * reach + 1)
            if i != reach
        ]
        return g.op("Add", embedded, self.linear(g.op("Concat", *parts, axis=2), f"{self.stem}.beside"))

    def clean(self, layer: str, x: str, condition: str, past: KeyValue | None) -> tuple[str, KeyValue]:
        """Clean tokens after what ``past`` holds -> the same, and the keys and values of all so far."""
        g = self.graph
        seen: list[KeyValue] = []

        def attend(q: str, k: str, v: str) -> str:
            if past is not None:
                k, v = g.op("Concat", past[0], k, axis=2), g.op("Concat", past[1], v, axis=2)
            seen.append((k, v))
            return self._mixed(q, *seen[0], self.bias)

        return self._stream(layer, x, condition, attend), seen[0]

    def _noisy(self, layer: str, x: str, condition: str, seen: KeyValue) -> str:
        """Noisy tokens, each of which sees the clean ones up to that beside it, and itself."""
        g = self.graph

        def attend(q: str, k: str, v: str) -> str:
            scores = g.op("MatMul", q, g.op("Transpose", seen[0], perm=[0, 1, 3, 2]))
            own = g.op("ReduceSum", g.op("Mul", q, k), g.ints(-1), keepdims=1)
            total = g.op("Concat", g.op("Add", scores, self._flat_bias()), own, axis=3)
            p = g.op("Softmax", total, axis=-1)
            # Not from 0 to -1: of such slices onnxruntime's training makes a Split that writes where it must not.
            count = g.op("Shape", seen[0], start=2, end=3)
            of_clean = g.op("Slice", p, g.ints(0), count, g.ints(3))
            of_own = g.op("Slice", p, count, g.op("Add", count, g.ints(1)), g.ints(3))
            return g.op("Add", g.op("MatMul", of_clean, seen[1]), g.op("Mul", of_own, v))

        clean_angles, (self.cos, self.sin) = (self.cos, self.sin), self._beside
        try:
            return self._stream(layer, x, condition, attend)
        finally:
            self.cos, self.sin = clean_angles

    def prelude(self, ids: str) -> str:
        """e (batch, sequence, width), which comes to each state of the core."""
        g = self.graph
        self.measure(ids)
        self.turn_by(self.places(), self.model)
        self.see_before()
        e, condition = self.embedded(ids), clean_condition(g, self.stem)
        for number in range(self.model.prelude):
            e = self._causal(f"{self.stem}.prelude.{number}", e, condition)
        return e

    def core(self, state: str, injected: str, condition: str) -> str:
        """One run."""
        state = self.linear(self.graph.op("Concat", state, injected, axis=2), f"{self._adapter}.linear", coarse=True)
        for layer in self.layers:
            state = self._causal(layer, state, condition)
        return state

    def read_state(self, state: str, condition: str, noised: NoisedRows | None = None) -> str:
        """The coda and the logits."""
        for number in range(self.model.coda):
            state = self._causal(f"{self.head}.coda.{number}", state, condition)
        if noised is None:
            return self.logits(state, condition)
        return noised.with_evidence(self.logits(noised.read(state), condition))

    def logits(self, hidden: str, condition: str) -> str:
        """(batch, sequence, vocab_size); condition (m, width)."""
        g = self.graph
        with g.scope(self.head):
            modulation = g.op("Unsqueeze", g.linear(condition, f"{self.head}.modulation"), g.ints(1))
            return self.linear(
                self._adapted(hidden, *g.split(modulation, 2, 2, self.model.width)), f"{self.head}.readout"
            )

    def _causal(self, layer: str, x: str, condition: str) -> str:
        return self._stream(layer, x, condition, lambda q, k, v: self._mixed(q, k, v, self.bias))

    def _stream(self, layer: str, x: str, condition: str, attend: Callable[[str, str, str], str]) -> str:
        """One layer: x (batch, sequence, width), condition (m, width). ``attend`` gets scaled queries, keys and values,
        each (batch, heads, sequence, head_dim), and gives the same."""
        g, model = self.graph, self.model
        with g.scope(layer):
            modulation = g.op(
                "Unsqueeze", g.linear(condition, f"{layer}.modulation", coarse=True), g.ints(1)
            )  # (m, 1, 6 width)
            shift1, scale1, gate1, shift2, scale2, gate2 = g.split(modulation, 6, 2, model.width)
            qkv = self.linear(self._adapted(x, shift1, scale1), f"{layer}.qkv", coarse=True)
            q, k, v = (self.rows(one, model.heads, model.head_dim) for one in g.split(qkv, 3, 2, model.width))
            q, k = self.rotated(q), self.rotated(k)
            q, k, v = (g.op("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, k, v))
            mixed = attend(g.op("Mul", q, g.floats(model.head_dim**-0.5)), k, v)
            mixed = self.rows(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), model.width)
            x = g.op("Add", x, g.op("Mul", gate1, self.linear(mixed, f"{layer}.out", coarse=True)))
            hidden = self._adapted(x, shift2, scale2)
            inner = self.linear(hidden, f"{layer}.gate_up", coarse=True)
            gate, up = g.split(inner, 2, 2, model.mlp_ratio * model.width)
            down = self.linear(g.op("Mul", silu(g, gate), up), f"{layer}.down", coarse=True)
            return g.op("Add", x, g.op("Mul", gate2, down))

    def _mixed(self, q: str, k: str, v: str, bias: str) -> str:
        """Attention with scaled queries; ``bias``: added to scores, or empty where all see all."""
        g = self.graph
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
        if bias:
            scores = g.op("Add", scores, self._flat_bias())
        return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)

    def _flat_bias(self) -> str:
        """(m, 1, sequence, past + sequence)."""
        return self.graph.op("Squeeze", self.bias, self.graph.ints(2))

    def _adapted(self, x: str, shift: str, scale: str) -> str:
        """x / rms(x), then the condition's shift and scale."""
        g = self.graph
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
        normed = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.floats(_EPS))))
        return g.op("Add", g.op("Mul", normed, g.op("Add", scale, g.floats(1.0))), shift)
