"""The Serve application: three chained deployments. `serve_config.yaml` sets their replicas and resources."""

# No `from __future__ import annotations`: Serve reads the annotation of `build_app` itself; with a string it
# would silently pass the arguments on as an unchecked dict.

from pydantic import field_validator
from ray import serve
from ray.serve import Application

from llava_serve.api.keys import KEYS_VARIABLE
from llava_serve.app_options import AppOptions
from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.model_name import model_name
from llava_serve.config import ApiOptions
from llava_serve.processor import Processor

from .ingress import Ingress
from .model import LlavaModel
from .preprocessor import ImagePreprocessor

DEPLOYMENTS = tuple(each.__name__ for each in (Ingress, ImagePreprocessor, LlavaModel))
"""The names of the deployments in a config."""


class AppArgs(AppOptions):
    """The application's `args` in `serve_config.yaml`, without `api_keys`."""

    @field_validator("api")
    @classmethod
    def _refuse_keys(cls, given: ApiOptions) -> ApiOptions:
        if given.api_keys:
            raise ValueError(
                "Ray logs these arguments, with api_keys; put keys into api_keys_file or the environment variable "
                f"{KEYS_VARIABLE}, and replace those that stood here"
            )
        return given

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self.api.model_name or model_name(self.model)


def build_app(args: AppArgs) -> Application:
    """Chains the deployments: the ingress has a handle to each of the other two.

    Serve calls it before it touches what runs: an error here fails the deployment, and the old replicas stay.

    Raises:
        CheckpointError: the checkpoint's description cannot be used. It is read here, too, without the weights.
    """
    spec = open_checkpoint(args.model_options, weights=False)
    Processor(spec.limited_to(args.engine.max_model_len), args.images)
    model = serve.deployment(LlavaModel).bind(args.model_options, args.engine, args.images, args.probe, args.model_name)
    preprocessor = serve.deployment(ImagePreprocessor).bind(
        args.model_options, args.images, args.engine.max_model_len, model
    )
    ingress = serve.deployment(serve.ingress()(Ingress))
    return ingress.bind(args.model_name, args.api, preprocessor, model, args.model_options.prompt_key)
