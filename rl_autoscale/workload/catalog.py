"""Public traces by name: where they are, what they weigh, whose they are. No data is shipped with the package."""

from __future__ import annotations

from dataclasses import dataclass

from rl_autoscale.workload.readers import OnBadRows, TraceFormat

_AZURE_2023 = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/b469a113cedca53ddc3bdea71a143dc4b7d8700c/data/"
)
_AZURE_2024 = "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace/"
_BURSTGPT = "https://github.com/HPMLL/BurstGPT/releases/download/v1.2/"
_MOONCAKE = (
    "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/"
)

_SPLITWISE = "Patel et al., Splitwise: Efficient generative LLM inference using phase splitting, ISCA 2024"
_DYNAMOLLM = (
    "Stojkovic et al., DynamoLLM: Designing LLM inference clusters for performance and energy efficiency, HPCA 2025"
)
_BURSTGPT_PAPER = (
    "Wang et al., BurstGPT: A real-world workload dataset to optimize LLM serving systems, 2024 (arXiv 2401.17644)"
)
_MOONCAKE_PAPER = "Qin et al., Mooncake: Trading more storage for less computation, FAST 2025"


@dataclass(frozen=True, slots=True)
class KnownTrace:
    """A public trace.

    Attributes:
        name: how scenarios call it.
        url: address of the original file, pinned to a commit where the host allows it.
        format: of the original file.
        num_requests: rows of the original, by its authors or counted; None if unknown.
        num_bytes: size of the original; None if unknown.
        sha256: of the original; None if it could not be computed or found, and then a download is reported as
            unverified.
        licence: of the data.
        citation: what its authors ask to cite.
        on_bad_rows: ``skip`` where the original is known or suspected to hold failed requests; what was skipped is
            always reported.
    """

    name: str
    url: str
    format: TraceFormat
    num_requests: int | None
    num_bytes: int | None
    sha256: str | None
    licence: str
    citation: str
    on_bad_rows: OnBadRows = "error"

    @property
    def file_name(self) -> str:
        """Name of the original file."""
        return self.url.rsplit("/", 1)[-1]


_TRACES = (
    KnownTrace(
        "azure2023_conv", _AZURE_2023 + "AzureLLMInferenceTrace_conv.csv", "azure", 19_366, 719_188,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8", "CC-BY-4.0", _SPLITWISE,
    ),
    KnownTrace(
        "azure2023_code", _AZURE_2023 + "AzureLLMInferenceTrace_code.csv", "azure", 8_819, 320_117,
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6", "CC-BY-4.0", _SPLITWISE,
    ),
    KnownTrace(
        "azure2024_conv", _AZURE_2024 + "AzureLLMInferenceTrace_conv_1week.csv", "azure", 27_303_999, None,
        None, "CC-BY-4.0", _DYNAMOLLM, "skip",
    ),
    KnownTrace(
        # this checksum was read in third-party code, not computed from the file
        "azure2024_code", _AZURE_2024 + "AzureLLMInferenceTrace_code_1week.csv", "azure", 16_803_695, 691_989_454,
        "71de5c55cbc35f8f1ed0b6b7806b4cd1e9764b0058469725a6aac98023a1448f", "CC-BY-4.0", _DYNAMOLLM, "skip",
    ),
    *(
        KnownTrace(
            f"burstgpt_{part}", f"{_BURSTGPT}BurstGPT_{part}.csv", "burstgpt", rows, None,
            None, "CC-BY-4.0", _BURSTGPT_PAPER, "skip",
        )
        for part, rows in ((1, 1_429_737), (2, None), (3, 5_344_021))
    ),
    KnownTrace(
        "mooncake_conversation", _MOONCAKE + "traces/conversation_trace.jsonl", "mooncake", 12_031, 3_029_533,
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df", "Apache-2.0", _MOONCAKE_PAPER,
    ),
    KnownTrace(
        "mooncake_toolagent", _MOONCAKE + "traces/toolagent_trace.jsonl", "mooncake", 23_608, None,
        None, "Apache-2.0", _MOONCAKE_PAPER,
    ),
    KnownTrace(
        "mooncake_synthetic", _MOONCAKE + "traces/synthetic_trace.jsonl", "mooncake", 3_993, 1_136_313,
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131", "Apache-2.0", _MOONCAKE_PAPER,
    ),
    KnownTrace(
        "mooncake_arxiv", _MOONCAKE + "arxiv-trace/mooncake_trace.jsonl", "mooncake", 23_608, None,
        None, "Apache-2.0", _MOONCAKE_PAPER,
    ),
)  # fmt: skip

KNOWN_TRACES: dict[str, KnownTrace] = {trace.name: trace for trace in _TRACES}
"""Every trace `store.TraceStore` can download."""
