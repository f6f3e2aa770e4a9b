"""A replica's options: those of the application's `args`, changed by its deployment's `user_config` while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Generic

from llava_serve.app_options import changed_options
from llava_serve.errors import LlavaServeError
from llava_serve.options import SomeOptions

from .handle_calls import SERVE_LOGGER

logger = logging.getLogger(SERVE_LOGGER)


class LiveConfig(Generic[SomeOptions]):
    """Applies what Serve passes to `reconfigure`.

    A wrong `user_config` fails a replica that starts: it must not serve with other limits than the config says. One
    that runs keeps its options, since Serve would stop it.

    Args:
        deployment: its name.
        options: those of `args`, in which the replica has started.
        apply: puts other options into effect. It is called in a thread; if it raises, nothing has changed.

    Attributes:
        options: in effect.
    """

    def __init__(self, deployment: str, options: SomeOptions, apply: Callable[[SomeOptions], None]) -> None:
        self.options = options
        self._deployment = deployment
        self._base = options
        self._apply = apply
        self._started = False

    async def change(self, user_config: Mapping[str, object] | None) -> None:
        """To be called by a `reconfigure` that takes `rank`: so Serve also calls it without a `user_config`, at the
        start and when it is removed.

        Raises:
            RequestError: the replica starts, and the `user_config` cannot be used.
        """
        try:
            options = changed_options(self._deployment, self._base, user_config)
            if options != self.options:
                await asyncio.to_thread(self._apply, options)
                self.options = options
                logger.info("The user_config of %s is in effect.", self._deployment)
        except Exception as error:
            if not self._started:
                raise
            cause = None if isinstance(error, LlavaServeError) else error
            message = "The user_config of %s is refused, and the options before it stay. %s"
            logger.error(message, self._deployment, error, exc_info=cause)
        self._started = True
