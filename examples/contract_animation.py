"""Draw the moving picture of the README: what each layer of the model in the package does to one scan of a digit.

    python examples/contract_animation.py [--digit 5] [--output docs/images/contract.svg]

In each layer the head is shown whose rate falls most, in a plane of its subspace: across the principal direction of
the representatives, upwards the direction at right angles to it in which they are moved most. Everything is as the
layer computes it: extraction from the first guesses, contraction, broadcast. The rates are those of
:func:`cbsa_torch.interpret.certificate`.
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
INK, ORANGE, GREY = "#1f3b63", "#d9661f", "#8a8f98"


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
        contracted = extracted + weights @ moved
        across = torch.linalg.svd(extracted).Vh[0]
        change = contracted - extracted
        upwards = torch.linalg.svd(change - (change @ across)[:, None] * across).Vh[0]
        plane = torch.stack([across, upwards], dim=1)  # directions as columns
        seen = {
            "tokens": stages.tokens[0, head],
            "tokens_after": stages.tokens[0, head] + moved,
            "guesses": stages.representatives[0, head],
            "extracted": extracted,
            "contracted": contracted,
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
    """How representatives, tokens and the bar of a layer move; in per cent of the whole."""
    (e0, e1), (c0, c1), (b0, b1) = times.values()
    shown = e0 + 0.25 * (e1 - e0)
    left = layer.rate_after / layer.rate
    return [
        f"@keyframes r{index}{{0%,{e0:.2f}%{{translate:var(--g);opacity:0}}{shown:.2f}%{{translate:var(--g);"
        f"opacity:1}}{e1:.2f}%,{c0:.2f}%{{translate:0 0}}{c1:.2f}%,98%{{translate:var(--c);opacity:1}}"
        "to{translate:var(--c);opacity:0}}",
        f"@keyframes t{index}{{0%,{b0:.2f}%{{translate:0 0}}{b1:.2f}%,98%{{translate:var(--d)}}to{{translate:0 0}}}}",
        f"@keyframes l{index}{{0%,{c0:.2f}%{{scale:1 1}}{c1:.2f}%,98%{{scale:{left:.4f} 1}}to{{scale:1 1}}}}",
        f"@keyframes n{index}{{0%,{c1 - 0.01:.2f}%{{opacity:0}}{c1:.2f}%,98%{{opacity:1}}to{{opacity:0}}}}",
        f"@keyframes b{index}{{0%,{c1 - 0.01:.2f}%{{opacity:1}}{c1:.2f}%,98%{{opacity:0}}to{{opacity:1}}}}",
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
    pixels = len(ink)
    moves = place(layer.tokens_after) - place(layer.tokens)
    for value, (cx, cy), (dx, dy) in zip(
        ink, place(layer.tokens)[-pixels:].tolist(), moves[-pixels:].tolist(), strict=True
    ):
        parts.append(
            f'<circle class="t" cx="{cx:.1f}" cy="{cy:.1f}" r="2.6" fill="{INK}" fill-opacity="{0.18 + 0.8 * value:.2f}" '
            f'style="--d:{dx:.1f}px {dy:.1f}px;animation-name:t{index}"/>'
        )
    guesses, contracted = (place(p) - place(layer.extracted) for p in (layer.guesses, layer.contracted))
    for (cx, cy), (gx, gy), (dx, dy) in zip(
        place(layer.extracted).tolist(), guesses.tolist(), contracted.tolist(), strict=True
    ):
        parts.append(
            f'<circle class="r" cx="{cx:.1f}" cy="{cy:.1f}" r="4.2" style="--g:{gx:.1f}px {gy:.1f}px;'
            f'--c:{dx:.1f}px {dy:.1f}px;animation-name:r{index}"/>'
        )
    bar = TOP + PANEL + 12
    most = x + PANEL * layer.at_most / layer.rate
    parts += [
        f'<rect x="{x:g}" y="{bar:g}" width="{PANEL:g}" height="7" fill="#edeff2"/>',
        f'<rect x="{x:g}" y="{bar:g}" width="{PANEL:g}" height="7" fill="{INK}" style="transform-origin:{x:g}px 0;'
        f'animation-name:l{index}"/>',
        f'<path d="M{most:.1f} {bar - 3:g}v13" stroke="{ORANGE}" stroke-width="2"/>',
        f'<text class="b" x="{x:g}" y="{bar + 26:g}" style="animation-name:b{index}">rate {layer.rate:.2f} nats</text>',
        f'<text x="{x:g}" y="{bar + 26:g}" style="animation-name:n{index}">rate {layer.rate:.2f} to '
        f"{layer.rate_after:.2f} nats</text>",
        f'<text class="s" x="{x:g}" y="{bar + 42:g}">theorem: at most {layer.at_most:.2f}</text>',
    ]
    return "".join(parts)


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
