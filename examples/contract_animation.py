"""Draw the moving picture of the README: what each layer of the model in the package does to a scan of a digit.

    python examples/contract_animation.py [--digit 5] [--output docs/images/contract.svg]

In each layer the head is shown whose rate falls most. Its tokens and representatives are seen along the two
principal directions of the representatives. Everything is as the layer computes it: extraction from the first
guesses, contraction, broadcast; the rates are those of :func:`cbsa_torch.interpret.certificate`.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import tyro
from PIL import Image
from torch import Tensor

import cbsa_torch.models  # noqa: F401  (registers the models)
from cbsa_torch import interpret
from cbsa_torch.train.data.arrays import open_digits

MODEL = "cbt_pico_patch1_8.certified_digits"
PANEL, GAP, TOP, LEFT, SCAN = 168.0, 14.0, 46.0, 128.0, 104.0
TURN, END = 3.4, 2.6
"""Seconds: what a layer has, and what the last picture stays."""
ACTS = {"extract": (0.0, 1.1), "contract": (1.3, 2.1), "broadcast": (2.3, 3.1)}
"""Seconds within a layer's turn."""
INK, ORANGE = "#1f3b63", "#d9661f"


@dataclass
class Options:
    """Which scan, and where to."""

    digit: int = 5
    """The first test image of this class."""
    output: Path = Path("docs/images/contract.svg")


@dataclass
class Layer:
    """One head of one layer; points are ``(..., 2)`` in its plane, rates in nats."""

    tokens: Tensor
    tokens_after: Tensor
    guesses: Tensor
    extracted: Tensor
    contracted: Tensor
    rate: float
    rate_after: float
    at_most: float


def observe(pixels: Tensor) -> list[Layer]:
    """What every layer does to a scan ``(8, 8)`` with values from 0 to 1."""
    model = timm.create_model(MODEL, pretrained=True).eval()
    image = (pixels[None, None] - 0.5) / 0.5
    measured = interpret.certificate(model, image).layers
    with torch.no_grad(), interpret.capture(model) as records:
        model(image)
    layers = []
    for record, rates in zip(records.values(), measured, strict=True):
        assert record.stages is not None
        assert record.token_weights is not None
        assert rates.guaranteed is not None
        head = int((rates.before - rates.after)[0].argmax())
        stages, weights = record.stages, record.token_weights[0, head]
        moved = stages.output[0, head]  # what the step adds to every token
        extracted = stages.extracted[0, head]
        plane = torch.linalg.svd(extracted).Vh[:2].mT  # the two principal directions, as columns
        seen = {
            "tokens": stages.tokens[0, head],
            "tokens_after": stages.tokens[0, head] + moved,
            "guesses": stages.representatives[0, head],
            "extracted": extracted,
            "contracted": extracted + weights @ moved,
        }
        before, after, fall = (x[0, head].item() for x in (rates.before, rates.after, rates.guaranteed))
        points = {name: values @ plane for name, values in seen.items()}
        layers.append(Layer(**points, rate=before, rate_after=after, at_most=before - fall))
    return layers


def draw(pixels: Tensor, layers: list[Layer]) -> str:
    """The animation as SVG, moved by CSS; where motion is not wanted it shows the end."""
    seconds = len(layers) * TURN + END
    width = LEFT + len(layers) * (PANEL + GAP)
    height = TOP + PANEL + 64
    style = [
        "text{font:12px system-ui,sans-serif;fill:#333}.s{font-size:11px;fill:#666}",
        f".r{{fill:{ORANGE};stroke:#fff;stroke-width:.7}}circle,rect,text{{animation-duration:{seconds:g}s;"
        "animation-iteration-count:infinite;animation-timing-function:ease-in-out}",
        "@media(prefers-reduced-motion:reduce){circle,rect,text{animation:none!important}.t{translate:var(--d)}"
        ".r{translate:var(--c)}.b{opacity:0}}",
    ]
    body = [
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
        '<text x="12" y="24">the scan</text>',
        f'<image x="12" y="{TOP:g}" width="{SCAN:g}" height="{SCAN:g}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{_png(pixels)}"/>',
    ]
    for index, name in enumerate(ACTS):
        spans = [(i * TURN + ACTS[name][0], i * TURN + ACTS[name][1]) for i in range(len(layers))]
        style.append(_lit(f"a{index}", spans, seconds))
        body.append(
            f'<text x="12" y="{TOP + SCAN + 26 + 20 * index:g}" style="animation-name:a{index}" '
            f'font-weight="600" opacity=".35">{name}</text>'
        )
    ink = pixels.flatten().tolist()
    for index, layer in enumerate(layers):
        x, start = LEFT + index * (PANEL + GAP), index * TURN
        times = {name: tuple(100 * (start + t) / seconds for t in span) for name, span in ACTS.items()}
        style += _keyframes(index, times, layer)
        body.append(_panel(index, layer, ink, x))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><style>{"".join(style)}</style>{"".join(body)}</svg>\n'
    )


def _keyframes(index: int, times: dict[str, tuple[float, ...]], layer: Layer) -> list[str]:
    """How representatives, tokens, the bar and the text of a layer change; times in per cent of the whole."""
    (e0, e1), (c0, c1), (b0, b1) = times.values()

    def keyframes(name: str, *steps: str) -> str:
        return f"@keyframes {name}{index}{{{''.join(steps)}}}"

    def change(name: str, begin: float, end: float, first: str, last: str) -> str:
        return keyframes(name, f"0%,{begin:.2f}%{{{first}}}", f"{end:.2f}%,98%{{{last}}}", f"to{{{first}}}")

    return [
        keyframes(
            "r",
            f"0%,{e0:.2f}%{{translate:var(--g);opacity:0}}",
            f"{e0 + 0.25 * (e1 - e0):.2f}%{{translate:var(--g);opacity:1}}",
            f"{e1:.2f}%,{c0:.2f}%{{translate:0 0}}",
            f"{c1:.2f}%,98%{{translate:var(--c);opacity:1}}",
            "to{translate:var(--c);opacity:0}",
        ),
        change("t", b0, b1, "translate:0 0", "translate:var(--d)"),
        change("l", c0, c1, "scale:1 1", f"scale:{layer.rate_after / layer.rate:.4f} 1"),
        change("n", c1 - 0.01, c1, "opacity:0", "opacity:1"),
        change("b", c1 - 0.01, c1, "opacity:1", "opacity:0"),
    ]


def _lit(name: str, spans: list[tuple[float, float]], seconds: float) -> str:
    """Keyframes of a word that is dark during these seconds and pale otherwise."""
    steps = ["0%{opacity:.35}"]
    for begin, end in spans:
        marks = (begin + 0.01, begin + 0.15, end, end + 0.15)
        steps += [
            f"{100 * t / seconds:.2f}%{{opacity:{o}}}" for t, o in zip(marks, (0.35, 1, 1, 0.35), strict=True)
        ]
    return f"@keyframes {name}{{{''.join(steps)}to{{opacity:.35}}}}"


def _panel(index: int, layer: Layer, ink: list[float], x: float) -> str:
    """One layer: its tokens and representatives, and the bar of its rate below."""
    everything = torch.cat([layer.tokens, layer.guesses, layer.extracted])
    unit = 0.46 * PANEL / everything.abs().max()
    centre = torch.tensor([x + PANEL / 2, TOP + PANEL / 2])

    def place(points: Tensor) -> Tensor:
        return centre + unit * points

    parts = [
        f'<text x="{x:g}" y="24">layer {index + 1}</text>',
        f'<rect x="{x:g}" y="{TOP:g}" width="{PANEL:g}" height="{PANEL:g}" fill="#fafbfc" stroke="#d6dae0"/>',
        f'<path d="M{x:g} {centre[1]:g}h{PANEL:g}M{centre[0]:g} {TOP:g}v{PANEL:g}" stroke="#e3e6ea"/>',
    ]
    pixels = len(ink)  # the tokens after the class token
    tokens = place(layer.tokens)[-pixels:]
    moves = place(layer.tokens_after)[-pixels:] - tokens
    for value, at, move in zip(ink, tokens, moves, strict=True):
        fill = f'fill="{INK}" fill-opacity="{0.18 + 0.8 * value:.2f}"'
        parts.append(_circle("t", index, at, 2.6, fill, f"--d:{_pixels(move)}"))
    extracted = place(layer.extracted)
    starts, ends = (place(points) - extracted for points in (layer.guesses, layer.contracted))
    for at, start, end in zip(extracted, starts, ends, strict=True):
        parts.append(_circle("r", index, at, 4.2, "", f"--g:{_pixels(start)};--c:{_pixels(end)}"))
    bar = TOP + PANEL + 12
    box = f'x="{x:g}" y="{bar:g}" width="{PANEL:g}" height="7"'
    text = f'x="{x:g}" y="{bar + 26:g}"'
    most = x + PANEL * layer.at_most / layer.rate
    return "".join(
        [
            *parts,
            f'<rect {box} fill="#edeff2"/>',
            f'<rect {box} fill="{INK}" style="transform-origin:{x:g}px 0;animation-name:l{index}"/>',
            f'<path d="M{most:.1f} {bar - 3:g}v13" stroke="{ORANGE}" stroke-width="2"/>',
            f'<text class="b" {text} style="animation-name:b{index}">rate {layer.rate:.2f} nats</text>',
            f'<text {text} style="animation-name:n{index}">',
            f"rate {layer.rate:.2f} to {layer.rate_after:.2f} nats</text>",
            f'<text class="s" x="{x:g}" y="{bar + 42:g}">theorem: at most {layer.at_most:.2f}</text>',
        ]
    )


def _circle(kind: str, index: int, at: Tensor, radius: float, fill: str, moves: str) -> str:
    """A point that moves as the keyframes of its kind and layer say."""
    x, y = at.tolist()
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle class="{kind}" {place} {fill} style="{moves};animation-name:{kind}{index}"/>'


def _pixels(move: Tensor) -> str:
    return " ".join(f"{value:.1f}px" for value in move.tolist())


def _png(pixels: Tensor) -> str:
    data = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().numpy()).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def main() -> None:
    """Draw it."""
    options = tyro.cli(Options)
    test = open_digits("L")[0]["test"]
    index = test.labels.tolist().index(options.digit)
    pixels = torch.from_numpy(test.pixels[index]).float() / 255
    layers = observe(pixels)
    for number, layer in enumerate(layers, 1):
        print(
            f"layer {number}: rate {layer.rate:.2f} to {layer.rate_after:.2f}, at most {layer.at_most:.2f} nats"
        )
    options.output.write_text(draw(pixels, layers), encoding="utf-8")
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
