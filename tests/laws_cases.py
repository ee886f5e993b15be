"""Synthetic worlds with known truth, and plain formulas of every law, for the tests of the laws."""

from pathlib import Path

import numpy as np
import pandas as pd

DATA = Path(__file__).parent / "data"
EFFS = {"dense": 1.0, "f1": 0.85, "f2": 0.6, "f3": 0.3}
SCARCE_EFFS = {"dense": 1.0, "a": 0.9, "b": 0.7, "c": 0.4, "e": 0.15}


def quest() -> pd.DataFrame:
    return pd.read_csv(DATA / "quest_losses.csv")


def t5() -> pd.DataFrame:
    return pd.read_csv(DATA / "t5_sparse_losses.csv")


def grid(names: dict[str, float], sizes: int = 4, ratios: tuple[float, ...] = (25, 50, 100, 200)) -> pd.DataFrame:
    """Every representation at every size and ratio of tokens per parameter."""
    rows = [(n, n * r, name) for name in names for n in np.geomspace(3e7, 4e8, sizes) for r in ratios]
    return pd.DataFrame(rows, columns=["n", "d", "representation"])


def chinchilla_rows(rows: int = 240, seed: int = 0, noise: float = 0.01) -> pd.DataFrame:
    """Scattered dense runs with heavy-tailed noise, at the exponents that Besiroglu et al. (2404.10102) report."""
    generator = np.random.default_rng(seed)
    n = np.exp(generator.uniform(np.log(5e7), np.log(1e10), rows))
    d = np.exp(generator.uniform(np.log(5e8), np.log(4e11), rows))
    loss = 482.0 * n**-0.348 + 2085.4 * d**-0.366 + 1.817
    loss = loss * np.exp(noise * generator.standard_t(3, rows) / np.sqrt(3))
    return pd.DataFrame({"n": n, "d": d, "representation": "dense", "loss": loss})


def compression_world(seed: int = 0, noise: float = 0.004, **shape: object) -> pd.DataFrame:
    """The compression law with A 60, alpha .25, B 800, beta .32, E 1.6 and Gaussian log noise."""
    table = grid(EFFS, **shape)  # type: ignore[arg-type]
    eff = table["representation"].map(EFFS)
    loss = 60.0 * (table["n"] * eff) ** -0.25 + 800.0 * table["d"] ** -0.32 + 1.6
    return table.assign(loss=loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(table))))


def scarce_world(seed: int) -> pd.DataFrame:
    """The same law where runs are few: 12 dense ones, 4 of every compressed representation; 9 parameters in all."""
    rows = [(n, n * r, "dense") for n in np.geomspace(3e7, 8e8, 4) for r in (20, 60, 180)]
    points = ((3e7, 100), (9e7, 50), (27e7, 100), (8e8, 30))
    rows += [(n, n * r, name) for name in SCARCE_EFFS if name != "dense" for n, r in points]
    table = pd.DataFrame(rows, columns=["n", "d", "representation"])
    eff = table["representation"].map(SCARCE_EFFS)
    loss = 60.0 * (table["n"] * eff) ** -0.25 + 800.0 * table["d"] ** -0.32 + 1.6
    return table.assign(loss=loss * np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(table))))


def covariate_table() -> pd.DataFrame:
    """A table with every optional column, so that every law can be bound to it."""
    table = grid(EFFS, sizes=3, ratios=(20, 60, 180))
    code = table["representation"].map({"dense": 0, "f1": 1, "f2": 2, "f3": 3}).to_numpy()
    pick = lambda *values: np.array(values, dtype=float)[code]  # noqa: E731
    return table.assign(
        loss=3.0,
        gmse=pick(0, 0.01, 0.04, 0.2),
        activation_gmse=pick(0, 0.0, 0.03, 0.1),
        sparsity=pick(0, 0.25, 0.5, 0.75),
        w_bits=pick(16, 8, 4, 3),
        a_bits=pick(16, 16, 8, 4),
        ptq_bits=pick(0, 0, 4, 3),
        group_size=pick(0, 32, 128, 512),
        exponent_bits=pick(5, 4, 2, 3),
        mantissa_bits=pick(10, 3, 1, 2),
        block_size=pick(1, 32, 64, 128),
        backward=np.array(["dense", "dense", "sr", "rtn"])[code],
        family=np.array(["", "int", "int", "vq"])[code],
    )


def plain_loss(law: str, p: dict[str, float], t: pd.DataFrame) -> np.ndarray:
    """Each law written out once more, as its paper prints it."""
    n, d, names = t["n"].to_numpy(float), t["d"].to_numpy(float), t["representation"].to_numpy()
    dense = names == "dense"
    eff = np.array([p.get(f"eff[{name}]", 1.0) for name in names])
    data = p["B"] * d ** -p["beta"]
    if law == "chinchilla":
        return p["A"] * n ** -p["alpha"] + data + p["E"]
    if law == "compression":
        return p["A"] * (n * eff) ** -p["alpha"] + data + p["E"]
    if law == "capacity":
        rho = np.ones(n.size)
        for i, row in enumerate(t.itertuples()):
            for mse, family in ((row.gmse, row.family), (row.activation_gmse, "activations")):
                if mse > 0:
                    bits = np.log(mse) / np.log(0.25)
                    rho[i] *= p[f"L[{family}]"] * np.tanh(p[f"F[{family}]"] * bits) ** p[f"C[{family}]"]
        return p["A"] * (n * rho) ** -p["alpha"] + data + p["E"]
    if law == "sparsity":
        kept = 1 - t["sparsity"].to_numpy()
        a_s, c_s = p["A"] * (1 - p["floor"]), p["A"] * p["floor"]
        return (a_s * kept ** p["b_S"] + c_s) * (n * kept) ** -p["alpha"] + data + p["E"]
    if law == "precision":
        size = n * (1 - np.exp(-t["w_bits"] / p["gamma_w"])) * (1 - np.exp(-t["a_bits"] / p["gamma_a"]))
        post = p["C_T"] * d ** p["g_D"] / n ** p["g_N"] * np.exp(-t["ptq_bits"] / p["gamma_post"])
        return np.asarray(p["A"] * size ** -p["alpha"] + data + p["E"] + np.where(t["ptq_bits"] > 0, post, 0.0))
    if law == "gamma":
        eff_d = np.array([p.get(f"eff_D[{name}]", 1.0) for name in t["backward"]])
        core = p["A"] * (n * eff) ** -p["alpha"] + p["B"] * (d * eff_d) ** -p["beta"]
        return core ** p["gamma"] + p["E"]
    base = p["A"] * n ** -p["alpha"] + data + p["E"]
    if law == "qat-gap":
        k = np.array([p.get(f"k[{name}]", 0.0) for name in names])
        groups = np.log2(np.where(dense, 2.0, t["group_size"]))
        return base + k * d ** p["g_D"] * groups ** p["g_G"] / n ** p["g_N"]
    gap = d ** p["beta"] / n ** p["alpha"] * np.log2(np.where(dense, 1.0, t["block_size"]))
    gap = gap / (p["g_F"] * (t["exponent_bits"] + 0.5) ** p["delta_F"] * (t["mantissa_bits"] + 0.5) ** p["nu_F"])
    return np.asarray(base + np.where(dense, 0.0, gap))


TRUTH: dict[str, dict[str, float]] = {
    "chinchilla": {},
    "compression": {"eff[f1]": 0.85, "eff[f2]": 0.6, "eff[f3]": 0.3},
    "capacity": {
        "L[int]": 1.0,
        "F[int]": 0.45,
        "C[int]": 1.3,
        "L[vq]": 1.0,
        "F[vq]": 0.6,
        "C[vq]": 1.1,
        "L[activations]": 1.0,
        "F[activations]": 0.5,
        "C[activations]": 1.6,
    },
    "sparsity": {"b_S": 0.8, "floor": 0.7},
    "precision": {"gamma_w": 2.7, "gamma_a": 2.2, "C_T": 0.06, "g_D": 0.5, "g_N": 0.35, "gamma_post": 0.9},
    "gamma": {"gamma": 0.6, "eff[f1]": 0.85, "eff[f2]": 0.6, "eff[f3]": 0.3, "eff_D[sr]": 0.9, "eff_D[rtn]": 0.7},
    "qat-gap": {"g_D": 0.07, "g_N": 0.22, "g_G": 0.78, "k[f1]": 0.05, "k[f2]": 0.16, "k[f3]": 0.4},
    "float": {"g_F": 1.1e4, "delta_F": 3.2, "nu_F": 2.95},
}
for values in TRUTH.values():
    values.update({"A": 60.0, "alpha": 0.25, "B": 800.0, "beta": 0.32, "E": 1.6})
