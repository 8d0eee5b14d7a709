"""NeMo's generation metrics in a validation on stores and on SFT files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.text_generation_strategy import (
    GPTModelTextGenerationStrategy,
)
from omegaconf import DictConfig, OmegaConf
from torchmetrics.text.rouge import ROUGEScore

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.reporting import ReportingSFTModel
from nemo_kd.nemo.rouge import WITHOUT_SENTENCES, splits_sentences
from nemo_kd.nemo.splits import ValidationSplit
from nemo_kd.visible import say


def check_generation(model_cfg: DictConfig, data_cfg: DictConfig) -> None:
    """Refuse, before a run begins, settings under which its first validation would fail.

    Errors: NemoKDError for generation under sequence parallelism.
    """
    generates = data_cfg.metric.name != "loss" or data_cfg.get("write_predictions_to_file")
    if generates and model_cfg.get("sequence_parallel"):
        raise NemoKDError(
            "generation in a validation with model.sequence_parallel=true: a single token "
            "cannot be split over ranks; set it to false, or model.data.validation_ds.metric.name="
            "loss and write_predictions_to_file=false"
        )


class GeneratingSFTModel(ReportingSFTModel):
    """SFT model with NeMo's `metric` and predictions on any tensor, pipeline and data layout."""

    def setup_metric(self, data_cfg: DictConfig) -> Any:
        """Create a metric for each store and each file; NeMo does so for `file_names` only."""
        sets = list(ValidationSplit.of(data_cfg).sources)
        metrics, name = super().setup_metric(OmegaConf.merge(data_cfg, {"file_names": sets}))
        if name == "rouge" and not splits_sentences():
            if not self.global_rank:
                say(
                    "rougeLsum is left out: it splits sentences with NLTK's punkt, which is not "
                    "on this machine (python -m nltk.downloader punkt_tab)"
                )
            metrics = [ROUGEScore(rouge_keys=WITHOUT_SENTENCES) for _ in sets]
        return metrics, name

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> Any:
        """Generate as NeMo does, but greedily by default, so that metrics are reproducible.

        Collectives beyond NeMo's: with more than two pipeline stages, a broadcast of the tokens
        over the stages, since NeMo counts predictions on every stage but middle stages have none.
        """
        config = self.get_inference_config()
        config.setdefault("greedy", True)
        # Set explicitly, since NeMo's default selection imports all of its multimodal models.
        config.setdefault("strategy", GPTModelTextGenerationStrategy(self))
        # A copy, since NeMo on a CPU writes the answers into it; cut to the longest context.
        longest = int(batch["context_lengths"].max())
        contexts = torch.nn.functional.pad(
            batch["contexts"][:, :longest],
            (0, config["tokens_to_generate"]),
            value=self.tokenizer.eos_id,
        )
        with self._at_inference():
            response = super().predict_step(
                {**batch, "contexts": contexts}, batch_idx, dataloader_idx
            )
        if parallel_state.get_pipeline_model_parallel_world_size() <= 2:
            return response
        token_ids = [response["token_ids"] if response else None]
        torch.distributed.broadcast_object_list(
            token_ids,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return {"token_ids": token_ids[0]}

    @contextmanager
    def _at_inference(self) -> Iterator[None]:
        """Turn off dropout, which NeMo's validation step turns on; clear the cache at the end."""
        modules = self.get_model_module_list()
        training = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            self.inference_params = None
            for module, mode in zip(modules, training, strict=True):
                module.train(mode)
