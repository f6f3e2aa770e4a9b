"""What the picture tier measures."""

from __future__ import annotations

from llava_serve.metrics import definitions as metrics
from llava_serve.metrics.exporter import Exporter, NoExporter


class ImageMetrics:
    """Of one process; for several threads."""

    def __init__(self) -> None:
        self.export_to(NoExporter())

    def export_to(self, exporter: Exporter) -> None:
        """Exports there from now on."""
        self._prompts = exporter.series(metrics.PROMPTS)
        self._seconds = exporter.series(metrics.PREPARE_SECONDS)
        self._images = exporter.series(metrics.IMAGES)
        self._decoded = exporter.series(metrics.DECODED_IMAGES)
        self._pixels = exporter.series(metrics.DECODED_PIXELS)
        self._ended = exporter.series(metrics.DECODE_ENDED)
        self._queries = exporter.series(metrics.TILE_QUERIES)
        self._hits = exporter.series(metrics.TILE_HITS)

    def prepared(self, images: int, seconds: float) -> None:
        """A prompt is ready, after so much work."""
        self._prompts.inc()
        self._seconds.observe(seconds)
        if images:
            self._images.inc(images)

    def looked_up(self, *, hit: bool) -> None:
        """An image was looked up in the cache of tiles."""
        self._queries.inc()
        if hit:
            self._hits.inc()

    def decoded(self, pixels: int) -> None:
        """An image was decoded."""
        self._decoded.inc()
        self._pixels.inc(pixels)

    def decoding_ended(self) -> None:
        """A process has ended, or was ended, while it decoded."""
        self._ended.inc()
