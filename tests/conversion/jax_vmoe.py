"""A V-MoE of google-research/vmoe: its parameter tree, and that code's formulae written out in numpy."""

import numpy as np


WIDTH, HEADS, MLP, EXPERTS, CHOSEN, LABELS, PATCH, SIDE = 16, 4, 24, 4, 2, 5, 4, 2
SPARSE = (1, 2)
Tree = dict[str, np.ndarray]


def tree(seed: int = 0) -> Tree:
    """The parameters of three layers, two of them sparse, as flax names and shapes them."""
    rng, head = np.random.default_rng(seed), WIDTH // HEADS
    shapes = {
        "cls": (1, 1, WIDTH),
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "Encoder/posembed_input/pos_embedding": (1, SIDE * SIDE + 1, WIDTH),
        "Encoder/encoder_norm/scale": (WIDTH,),
        "Encoder/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, LABELS),
        "head/bias": (LABELS,),
    }
    for layer in range(3):
        block = f"Encoder/encoderblock_{layer}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{block}/{norm}/scale": (WIDTH,), f"{block}/{norm}/bias": (WIDTH,)}
        for name in ("query", "key", "value"):
            shapes[f"{block}/SelfAttention/{name}/kernel"] = (WIDTH, HEADS, head)
            shapes[f"{block}/SelfAttention/{name}/bias"] = (HEADS, head)
        shapes[f"{block}/SelfAttention/out/kernel"] = (HEADS, head, WIDTH)
        shapes[f"{block}/SelfAttention/out/bias"] = (WIDTH,)
        mlp, stack = (f"{block}/Moe/Mlp", (EXPERTS,)) if layer in SPARSE else (f"{block}/Mlp", ())
        for dense, (before, after) in {"Dense_0": (WIDTH, MLP), "Dense_1": (MLP, WIDTH)}.items():
            shapes[f"{mlp}/{dense}/kernel"], shapes[f"{mlp}/{dense}/bias"] = (*stack, before, after), (*stack, after)
        if layer in SPARSE:
            shapes[f"{block}/Moe/Router/dense/kernel"] = (WIDTH, EXPERTS)
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def norm(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    """`flax.linen.gelu`, which approximates by default."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    query, key, value = (
        np.einsum("bnd,dhk->bnhk", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"]
        for part in ("query", "key", "value")
    )
    weights = softmax(np.einsum("bqhk,bnhk->bhqn", query / np.sqrt(query.shape[-1]), key))
    mixed = np.einsum("bhqn,bnhk->bqhk", weights, value)
    return np.einsum("bqhk,hkd->bqd", mixed, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def mlp(kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    return gelu(x @ kernels[0] + biases[0]) @ kernels[1] + biases[1]


def moe(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    """Top experts per item, with room for all: the gates of the whole softmax weigh the chosen experts."""
    gates = softmax(x @ p[f"{name}/Router/dense/kernel"])
    combine = np.where(gates >= np.sort(gates, axis=-1)[..., -CHOSEN, None], gates, 0)
    parts = [[p[f"{name}/Mlp/Dense_{i}/{part}"] for i in (0, 1)] for part in ("kernel", "bias")]
    outputs = [mlp([k[e] for k in parts[0]], [b[e] for b in parts[1]], x) for e in range(EXPERTS)]
    return np.einsum("bne,ebnd->bnd", combine, np.stack(outputs))


def forward(p: Tree, images: np.ndarray) -> np.ndarray:
    """`VisionTransformerMoe` in deterministic mode, on images of shape `(batch, height, width, channels)`."""
    p = {name: array.astype(np.float64) for name, array in p.items()}
    patches = images.reshape(len(images), SIDE, PATCH, SIDE, PATCH, 3)
    x = np.einsum("bipjqc,pqcd->bijd", patches, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(len(images), -1, WIDTH)
    x = np.concatenate([np.tile(p["cls"], (len(images), 1, 1)), x], axis=1)
    x = x + p["Encoder/posembed_input/pos_embedding"]
    for layer in range(3):
        block = f"Encoder/encoderblock_{layer}"
        x = x + attention(p, f"{block}/SelfAttention", norm(p, f"{block}/LayerNorm_0", x))
        y = norm(p, f"{block}/LayerNorm_1", x)
        if layer in SPARSE:
            x = x + moe(p, f"{block}/Moe", y)
        else:
            names = [[f"{block}/Mlp/Dense_{i}/{part}" for i in (0, 1)] for part in ("kernel", "bias")]
            x = x + mlp([p[name] for name in names[0]], [p[name] for name in names[1]], y)
    return norm(p, "Encoder/encoder_norm", x)[:, 0] @ p["head/kernel"] + p["head/bias"]
