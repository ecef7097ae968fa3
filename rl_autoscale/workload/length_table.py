"""Length models fitted to public data sets, by name.

Each marginal is a mixture of lognormals fitted by expectation maximisation to ln(tokens), two to four components by
BIC, clipped at the data set's longest value; `correlation` is that of the log lengths. KS is the Kolmogorov-Smirnov
distance of the fit to the whole sample. docs/workloads.md has the table with licences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.workload.lengths import LengthLaw, LengthModel, lognormal_mixture


@dataclass(frozen=True, slots=True)
class _Mixture:
    weights: tuple[float, ...]
    mus: tuple[float, ...]
    sigmas: tuple[float, ...]
    max_tokens: int
    ks: float

    def law(self) -> LengthLaw:
        return lognormal_mixture(self.weights, self.mus, self.sigmas, self.max_tokens)


@dataclass(frozen=True, slots=True)
class _Fit:
    prompt: _Mixture
    output: _Mixture
    correlation: float
    source: str


_FITS: dict[str, _Fit] = {
    "azure_conv": _Fit(
        _Mixture(
            (0.1895, 0.2311, 0.4077, 0.1717),
            (5.3919, 5.9874, 6.9968, 8.0092),
            (0.9597, 0.0399, 0.1022, 0.375),
            max_tokens=14050, ks=0.0468,
        ),
        _Mixture(
            (0.3469, 0.2815, 0.0885, 0.283),
            (4.4924, 4.6495, 5.0988, 6.0069),
            (0.2629, 1.0302, 0.1874, 0.0511),
            max_tokens=1000, ks=0.0338,
        ),
        0.088,
        "Azure LLM inference trace 2023, conversation (Patel et al., Splitwise, ISCA 2024)",
    ),
    "azure_code": _Fit(
        _Mixture(
            (0.0875, 0.1594, 0.3954, 0.3576),
            (4.1862, 5.5635, 7.1436, 8.1667),
            (0.9726, 0.6499, 0.4773, 0.5105),
            max_tokens=7437, ks=0.0273,
        ),
        _Mixture(
            (0.3994, 0.3633, 0.1743, 0.063),
            (2.1155, 2.7324, 3.7064, 4.8275),
            (0.2411, 0.2996, 0.4556, 0.754),
            max_tokens=1899, ks=0.0558,
        ),
        -0.004,
        "Azure LLM inference trace 2023, code (Patel et al., Splitwise, ISCA 2024)",
    ),
    "sharegpt": _Fit(
        _Mixture(
            (0.1273, 0.1405, 0.3415, 0.3907),
            (3.6224, 5.8702, 7.2059, 8.3436),
            (0.8283, 0.697, 0.4933, 0.3684),
            max_tokens=8141, ks=0.0208,
        ),
        _Mixture(
            (0.0281, 0.1624, 0.3635, 0.446),
            (2.3363, 4.4656, 5.7641, 6.4647),
            (1.0819, 0.6276, 0.3669, 0.279),
            max_tokens=1024, ks=0.0241,
        ),
        0.063,
        "ShareGPT, 8k contexts, as processed by project-etalon/etalon (Llama-2 tokenizer)",
    ),
    "arxiv_summarization": _Fit(
        _Mixture(
            (0.0336, 0.1072, 0.4096, 0.4496),
            (4.8429, 6.9832, 7.7097, 8.1125),
            (1.8365, 0.4614, 0.2325, 0.1131),
            max_tokens=4054, ks=0.0323,
        ),
        _Mixture(
            (0.2115, 0.4706, 0.2692, 0.0487),
            (4.4227, 5.0334, 5.6011, 7.6925),
            (0.4904, 0.3173, 0.3726, 0.4709),
            max_tokens=4056, ks=0.0111,
        ),
        -0.489,
        "arXiv summarisation, as processed by project-etalon/etalon (Llama-2 tokenizer)",
    ),
    "bwb": _Fit(
        _Mixture(
            (0.0071, 0.0938, 0.6903, 0.2088),
            (5.2706, 6.5283, 6.9101, 7.2537),
            (1.6231, 0.299, 0.1303, 0.1538),
            max_tokens=3504, ks=0.0168,
        ),
        _Mixture(
            (0.0075, 0.1231, 0.7487, 0.1207),
            (5.2097, 6.9997, 7.3645, 7.7328),
            (1.4702, 0.3369, 0.1235, 0.0778),
            max_tokens=2858, ks=0.0252,
        ),
        0.86,
        "BWB document translation, as processed by project-etalon/etalon (Llama-2 tokenizer)",
    ),
    "servegen_mlarge": _Fit(
        _Mixture(
            (0.3215, 0.1045, 0.3129, 0.2611),
            (4.295, 5.5826, 6.4902, 7.3447),
            (0.0827, 0.8059, 0.2203, 0.4631),
            max_tokens=29850, ks=0.0866,
        ),
        _Mixture(
            (0.0863, 0.174, 0.4468, 0.2929),
            (0.0, 1.3859, 4.3194, 6.1153),
            (0.01, 0.5417, 1.2047, 0.0828),
            max_tokens=8177, ks=0.0547,
        ),
        -0.168,
        "ServeGen m-large, day 2, clients with lengths (Xiang et al., NSDI 2026)",
    ),
    "mooncake_conversation": _Fit(
        _Mixture(
            (0.0939, 0.426, 0.3565, 0.1237),
            (6.8094, 8.0991, 9.4487, 10.3438),
            (0.0192, 0.771, 0.5444, 0.6789),
            max_tokens=126195, ks=0.0376,
        ),
        _Mixture(
            (0.3156, 0.6844),
            (3.8997, 5.9988),
            (1.5953, 0.364),
            max_tokens=2000, ks=0.0249,
        ),
        0.054,
        "Mooncake conversation trace (Qin et al., FAST 2025)",
    ),
    "deepseek_r1": _Fit(
        _Mixture(
            (0.3025, 0.3616, 0.2544, 0.0816),
            (3.0595, 4.6114, 6.7109, 9.3422),
            (0.5805, 0.7354, 0.691, 0.7184),
            max_tokens=57199, ks=0.0252,
        ),
        _Mixture(
            (0.3409, 0.4327, 0.2264),
            (5.9689, 7.1233, 8.4709),
            (0.4469, 0.3841, 0.6096),
            max_tokens=32698, ks=0.0084,
        ),
        -0.275,
        "ServeGen deepseek-r1, one day, reasoning tokens included (Xiang et al., NSDI 2026)",
    ),
}  # fmt: skip

LENGTH_MODEL_NAMES: tuple[str, ...] = tuple(_FITS)
"""Names `length_model` knows."""


@cache
def length_model(name: str) -> LengthModel:
    """Build a named length model; raises UnknownNameError with the nearest name."""
    if name not in _FITS:
        raise UnknownNameError("length model", name, _FITS)
    fit = _FITS[name]
    return LengthModel(fit.prompt.law(), fit.output.law(), fit.correlation, fit.source)


def fit_distances(name: str) -> tuple[float, float]:
    """Kolmogorov-Smirnov distances (prompt, output) of a named model to the data it was fitted to."""
    return _FITS[name].prompt.ks, _FITS[name].output.ks
