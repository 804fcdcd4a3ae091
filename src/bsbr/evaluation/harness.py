"""lm-evaluation-harness: the model type "bsbr", a converted folder or a stock model converted on the way.

Versions with plug-ins find it by the entry point in pyproject.toml; `python -m bsbr.evaluation.harness` is
`lm_eval` with it for those without.
"""

import sys
from dataclasses import fields
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.hf import BSBRModelMixin, convert


@register_model("bsbr")
class BSBRLM(HFLM):
    """The harness's Hugging Face model, with attention as `bsbr` has it.

    `pretrained` is a converted folder, or a stock folder or name with settings of a BSBRConfig beside it, as
    `pretrained=gpt2,top_k=4,dense_below=0`. Other arguments are those of the harness's `hf`.
    """

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        known = {field.name for field in fields(BSBRConfig)}
        given = {name: kwargs.pop(name) for name in known & set(kwargs)}
        super()._create_model(pretrained, **kwargs)
        model: Any = self.model
        if given:
            self._model = convert(model, BSBRConfig(**given))
        elif not isinstance(model, BSBRModelMixin):
            raise UserError(
                f'model "{pretrained}" is not converted: give the folder of a converted model, or settings beside it '
                "such as top_k=8"
            )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
