"""Images: drawn twice, for a light page and a dark one, and equal from run to run."""

import base64
import re

from lbllm_cli.pipeline import drawing


def test_images_have_the_colours_of_their_page():
    def paint(figure):
        axes = figure.add_subplot()
        axes.plot([1, 2], [1, 3], color=drawing.LIGHT.stages["distill"], label="x")
        axes.legend()

    image = drawing.draw("two points", paint)
    for uri, palette in ((image.light, drawing.LIGHT), (image.dark, drawing.DARK)):
        svg = base64.b64decode(uri.partition(",")[2]).decode()
        known = {palette.ink, palette.muted, palette.grid, *palette.stages.values()}
        assert set(re.findall('#[0-9a-f]{6}(?=[;"])', svg)) <= known
        assert palette.stages["distill"] in svg
        assert "<text" in svg
        assert "<dc:date>" not in svg
    assert image == drawing.draw("two points", paint)
    assert drawing.LIGHT.stages.keys() == drawing.DARK.stages.keys() == drawing.MARKERS.keys()
