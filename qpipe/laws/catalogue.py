"""The laws that can be fitted, as data: adding one is adding one entry.

N counts non-embedding parameters (for sparse runs all of them, non-zero or not), D training tokens; L in nats/token.
"""

from qpipe.errors import QpipeError, nearest
from qpipe.laws.model import Law
from qpipe.laws.parts import BitProduct, Capacity, FloatGap, FreeMultiplier, PostTraining, QatGap, SparseFactor

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "L = A N^-alpha + B D^-beta + E",
            "Hoffmann et al. 2022, arXiv 2203.15556",
            dense_only=True,
        ),
        Law(
            "compression",
            "L = A (N eff_R)^-alpha + B D^-beta + E, eff_dense = 1",
            "Frantar et al. 2025, arXiv 2502.16440",
            size=FreeMultiplier(),
            grouped="eff",
        ),
        Law(
            "capacity",
            "L = A (N rho)^-alpha + B D^-beta + E, rho = L_f tanh(F_f log_1/4 GMSE)^C_f per family f",
            "Panferov et al. 2025, arXiv 2506.01863",
            size=Capacity(),
            columns=("gmse",),
            optional=("activation_gmse", "family"),
        ),
        Law(
            "sparsity",
            "L = (a_S (1-S)^b_S + c_S) (N (1-S))^-alpha + B D^-beta + E, A = a_S + c_S, floor = c_S / A",
            "Frantar et al. 2023, arXiv 2309.08520",
            size=SparseFactor(),
            columns=("sparsity",),
        ),
        Law(
            "precision",
            "L = A N_eff^-alpha + B D^-beta + E + C_T D^g_D N^-g_N exp(-P_post/gamma_post), "
            "N_eff = N prod_x (1 - exp(-P_x/gamma_x))",
            "Kumar et al. 2024, arXiv 2411.04330",
            size=BitProduct(),
            penalty=PostTraining(),
            columns=("w_bits",),
            optional=("a_bits", "kv_bits", "ptq_bits"),
        ),
        Law(
            "gamma",
            "L = (A (N eff_R)^-alpha + B (D eff_D,R')^-beta)^gamma + E, eff_dense = 1",
            "Castro et al. 2025, arXiv 2505.14669",
            size=FreeMultiplier(),
            data=FreeMultiplier("eff_D", "backward", "beta", grouped=False),
            has_gamma=True,
            grouped="eff",
            optional=("backward",),
        ),
        Law(
            "qat-gap",
            "L = A N^-alpha + B D^-beta + E + k_R D^g_D (log2 G)^g_G N^-g_N",
            "Chen et al. 2025, arXiv 2505.14302",
            penalty=QatGap(),
            grouped="k",
            optional=("group_size",),
        ),
        Law(
            "float",
            "L = A N^-alpha + B D^-beta + E + D^beta N^-alpha log2(block) / (g_F (e+1/2)^delta_F (m+1/2)^nu_F)",
            "Sun et al. 2025, arXiv 2501.02423",
            penalty=FloatGap(),
            columns=("exponent_bits", "mantissa_bits", "block_size"),
        ),
    )
}


def get_law(name: str) -> Law:
    """Return a law by name (errors: unknown name, with the nearest known one)."""
    if name not in LAWS:
        raise QpipeError(f"no law '{name}'{nearest(name, LAWS)}; known: {', '.join(LAWS)}")
    return LAWS[name]
