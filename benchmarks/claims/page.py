"""The table of claims in docs/results/claims.md, and the plots, from the records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims import identities, judges, plots, scratch
from benchmarks.claims.judges import Finding
from benchmarks.estimates import markdown
from cbsa_torch._core.files import write_atomically

DOCS = Path("docs/results/claims.md")
TABLE, PICTURES = ((f"<!-- {part}: begin -->\n", f"\n<!-- {part}: end -->") for part in ("claims", "pictures"))
"""What parts of the page that are made from records begin and end with."""


class Setup(NamedTuple):
    """What was run: data and size, and the block of runs or the command."""

    ran: str
    block: str


class Claim(NamedTuple):
    """A statement of the paper and how it is judged."""

    says: str
    where: str
    setup: Setup
    judge: Callable[[], Finding | None]
    """None: the runs are not done."""


CIFAR = Setup(f"CIFAR-10 (JPEG), 45,000 images x {scratch.EPOCHS} epochs, 32 x 32", "scratch")
CIFAR_SPEED = Setup("nano models, 64 images of 32 x 32, one thread", "scratch")
STREET = Setup(
    "CamVid, maps of the ViT-S/14 adapted on CIFAR-10, 252 x 336, 117 test images, head and threshold of each "
    "class chosen on validation",
    "inside",
)
EMOJI = Setup("emoji64, 12 epochs, 64 x 64, 426 test drawings, head chosen on validation", "inside")
BENCH = Setup("small models, two CPU threads", "bench")
ADAPTED = Setup("ViT-S/14, CIFAR-10 (JPEG) at 112 x 112, 1,000 images x 3 epochs, 2,000 test images", "adapted")
ADAPTED_COST = Setup("ViT-S/14, one thread", "adapted")
CAMVID = Setup("CamVid, frozen ViT-S/14, 252 x 336, 233 test images", "decoders")
DECODER_COST = Setup("one image", "decoders")
EQUATION = Setup("random tokens, float64", "page")
LINES = Setup("10 lines of 100 points, 1,024 steps", "small")
SMALL = Setup("digits, 8 x 8, 20 epochs, 360 test images", "small")
DIGITS = Setup("digits, 8 x 8, 80 epochs, 360 test images", "digits_family")
LARGE = Setup("ViT-S/14, CIFAR-10 (JPEG) at 224 x 224, 1,000 images x 3 epochs, 2,000 test images", "adapted")
FINETUNED = Setup("CamVid, ViT-S/14 trained along, 252 x 336, 2 epochs, 233 test images", "decoders")
ELSEWHERE = Setup("nothing", "none")
COUNTED = Setup("12 layers, N = 197", "page")
LAYER = Setup("one layer, M = P = 64", "page")


CLAIMS = (
    Claim(
        "A C is the gradient of the coding rate, A held",
        "Eq. 6, 7",
        EQUATION,
        judges.identity(identities.gradient),
    ),
    Claim(
        "all tokens as representatives: softmax attention",
        "Eq. 9",
        EQUATION,
        judges.identity(identities.softmax_attention),
    ),
    Claim(
        "principal directions: linear attention",
        "Eq. 12",
        EQUATION,
        judges.identity(identities.linear_attention),
    ),
    Claim(
        "a fixed basis: channel attention",
        "Eq. 13",
        EQUATION,
        judges.identity(identities.channel_attention),
    ),
    Claim(
        "no contraction, a softmax to broadcast: agent attention",
        "section 3.3",
        EQUATION,
        judges.identity(identities.agent_attention),
    ),
    Claim(
        "the linear form presses noisy points onto separate lines",
        "Fig. 4",
        LINES,
        judges.lines,
    ),
    Claim("MSSA is at least as accurate as Agent", "Table 4", CIFAR, judges.accuracy("crate", "agent")),
    Claim("Agent is at least as accurate as CBSA", "Table 4", CIFAR, judges.accuracy("agent", "cbt")),
    Claim("CBSA is more accurate than TSSA", "Table 4", CIFAR, judges.accuracy("cbt", "tost")),
    Claim(
        "CBSA needs fewer pairwise similarities than MSSA, as printed",
        "Table 4",
        COUNTED,
        judges.similarities,
    ),
    Claim("CBSA costs less than MSSA from N > 2p on", "Table 1", LAYER, judges.crossing),
    Claim(
        "CBT infers faster than ViT at 512 x 512",
        "Table 7",
        BENCH,
        judges.speed("naive_cbt", "vit", training=False),
    ),
    Claim(
        "CBT trains faster than ViT at 512 x 512",
        "Table 7",
        BENCH,
        judges.speed("naive_cbt", "vit", training=True),
    ),
    Claim(
        "CBT infers faster than CRATE at 512 x 512",
        "Table 7",
        BENCH,
        judges.speed("cbt", "crate", training=False),
    ),
    Claim(
        "CBT trains faster than CRATE at 512 x 512",
        "Table 7",
        BENCH,
        judges.speed("cbt", "crate", training=True),
    ),
    Claim(
        "ToST infers faster than CBT at 512 x 512 (as printed of the small ones)",
        "Table 7",
        BENCH,
        judges.speed("tost", "cbt", training=False),
    ),
    Claim(
        "CBT trains faster than ToST at 512 x 512",
        "Table 7",
        BENCH,
        judges.speed("cbt", "tost", training=True),
    ),
    Claim(
        "an output projection of its own is more accurate than the tied one",
        "section 2",
        DIGITS,
        judges.tied,
    ),
    Claim(
        "pooled initial guesses are more accurate than learned ones",
        "section 3.2",
        CIFAR,
        judges.accuracy("cbt", "learned"),
    ),
    Claim("with pooling A has its full rank", "Appendix A", CIFAR, judges.ranks("cbt")),
    Claim("with learned initial guesses A has a low rank", "Appendix A", CIFAR, judges.ranks("learned")),
    Claim("the later half of the layers compresses", "Fig. 5", CIFAR, judges.later_half("cbt")),
    Claim(
        "the rates of tokens and representatives fall together (after a step of Eq. 6)",
        "Fig. 6",
        CIFAR,
        judges.together("W - A C"),
    ),
    Claim(
        "the rates fall together, with CBSA's output for the tokens after the step",
        "Fig. 6",
        CIFAR,
        judges.together("A C"),
    ),
    Claim("representatives are nearly as rich as all tokens", "Eq. 4", CIFAR, judges.gap),
    Claim(
        "a layer compresses the representatives (in more than 95 % of cases)",
        "Eq. 6, 7",
        CIFAR,
        judges.compresses("cbt", "representatives"),
    ),
    Claim(
        "a layer compresses all tokens by that (in more than 95 % of cases)",
        "title",
        CIFAR,
        judges.compresses("cbt", "tokens"),
    ),
    Claim(
        "of certified steps: every one keeps its guarantee",
        "ours",
        CIFAR,
        judges.certified("scratch_certified_seed?"),
    ),
    Claim(
        "of certified steps: every one keeps its guarantee, on digits (`make test-slow` repeats the first run)",
        "ours",
        SMALL,
        judges.certified("small_digits_seed?"),
    ),
    Claim(
        "of certified steps: all tokens are compressed (in more than 95 % of cases)",
        "ours",
        CIFAR,
        judges.compresses("certified", "tokens"),
    ),
    Claim("of certified steps: as accurate as the default", "ours", CIFAR, judges.accuracy("certified", "cbt")),
    Claim(
        "a fixed lattice of 8 x 8 initial guesses, as published, is as accurate as our 16",
        "ours",
        CIFAR,
        judges.accuracy("cbt_lattice", "cbt"),
    ),
    Claim(
        "CBT is faster than a ViT with the same stem on small images, too",
        "ours",
        CIFAR_SPEED,
        judges.small_speed("cbt", "vit"),
    ),
    Claim(
        "CBT is as accurate as a ViT with the same stem",
        "section 4.1",
        CIFAR,
        judges.accuracy("cbt", "vit"),
    ),
    Claim(
        "maps of the hybrid segment better than CRATE's",
        "Tables 5, 6",
        EMOJI,
        judges.zero_shot("crate_cbt", "crate"),
    ),
    Claim("CRATE's maps segment better than CBT's", "Table 5", EMOJI, judges.zero_shot("crate", "cbt")),
    Claim("CBT's maps segment better than ToST's", "Table 5", EMOJI, judges.zero_shot("cbt", "tost")),
    Claim(
        "maps of the hybrid segment streets better than the original's",
        "Tables 5, 6",
        STREET,
        judges.street_maps("hybrid", "original"),
    ),
    Claim(
        "maps of the hybrid segment streets better than the original's, the latter half of the layers of both",
        "Table 6",
        STREET,
        judges.street_maps("hybrid", "original", "mean_iou_latter_half"),
    ),
    Claim(
        "the original's segment streets better than those of CBSA* in all layers",
        "Table 5",
        STREET,
        judges.street_maps("original", "cbsa"),
    ),
    Claim(
        "an adapted ViT recovers the accuracy of the original, trained as long",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_all_plain_112", "original_all_plain_112"),
    ),
    Claim(
        "distilled from the original, it does",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_all_distilled_112", "original_all_plain_112"),
    ),
    Claim(
        "adapted in the latter half of the layers alone, it does",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_latter_half_plain_112", "original_all_plain_112"),
    ),
    Claim(
        "it is more accurate with the latter half of the layers adapted than with all",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_latter_half_plain_112", "cbsa_all_plain_112"),
    ),
    Claim(
        "CBSA* is more accurate than CBSA-vee: contraction helps",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_all_plain_112", "agent_all_plain_112"),
    ),
    Claim(
        "CBSA* is more accurate than linear attention",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_all_plain_112", "linear_all_plain_112"),
    ),
    Claim(
        "CBSA* is more accurate than linear attention, both distilled",
        "section 4.2",
        ADAPTED,
        judges.adapted("cbsa_all_distilled_112", "linear_all_distilled_112"),
    ),
    Claim(
        "CBSA* is more accurate than linear attention, on larger images",
        "section 4.2",
        LARGE,
        judges.adapted("cbsa_all_plain_224", "linear_all_plain_224"),
    ),
    Claim(
        "of CBSA*: gamma from 0 is more accurate than from 1, as published",
        "ours",
        ADAPTED,
        judges.adapted("cbsa_from0_all_plain_112", "cbsa_all_plain_112"),
    ),
    Claim("an adapted ViT takes fewer FLOPs", "Fig. 9", ADAPTED_COST, judges.adapted_flops(518)),
    *(
        Claim(
            f"an adapted ViT is faster at {side} x {side}", "Fig. 9", ADAPTED_COST, judges.adapted_speed(side)
        )
        for side in (224, 518, 1022)
    ),
    Claim(
        "CBSA's decoder reaches Segmenter's mean IoU", "ADE20K results", CAMVID, judges.masks("cbsa", "mhsa")
    ),
    Claim("CBSA's decoder reaches DEPICT's mean IoU", "ADE20K results", CAMVID, judges.masks("cbsa", "mssa")),
    Claim(
        "CBSA's decoder reaches Segmenter's mean IoU, with the encoder trained along",
        "ADE20K results",
        FINETUNED,
        judges.finetuned("cbsa", "mhsa"),
    ),
    Claim(
        "CBSA's decoder takes at most a fifth of Segmenter's FLOPs",
        "ADE20K results",
        DECODER_COST,
        judges.decoder_cost("flops", 20),
    ),
    Claim(
        "CBSA's decoder takes at most 0.06 % of Segmenter's pairwise similarities",
        "ADE20K results",
        DECODER_COST,
        judges.decoder_cost("similarities", 0.06),
    ),
    Claim(
        "noise of 0.01 on its attention hardly changes it (at most 5 % are lost)",
        "Fig. 8",
        CAMVID,
        judges.immune("cbsa", 0.01, 5),
    ),
    Claim(
        "noise of 0.1 on its attention hardly changes it (at most 5 % are lost)",
        "Fig. 8",
        CAMVID,
        judges.immune("cbsa", 0.1, 5),
    ),
    Claim(
        "CBSA keeps more under noise of 0.1 than Segmenter's",
        "Fig. 8",
        CAMVID,
        judges.keeps_more("cbsa", "mhsa", 0.1),
    ),
    Claim(
        "CBSA keeps more under noise of 0.1 than DEPICT's",
        "Fig. 8",
        CAMVID,
        judges.keeps_more("cbsa", "mssa", 0.1),
    ),
    Claim(
        "of certified steps: the decoder reaches the default's mean IoU",
        "ours",
        CAMVID,
        judges.masks("certified", "cbsa"),
    ),
    Claim(
        "a fixed lattice of 10 x 10 initial guesses, as published: the decoder reaches the default's mean IoU",
        "ours",
        CAMVID,
        judges.masks("cbsa_lattice", "cbsa"),
    ),
    Claim(
        "accuracies as printed (CBT-B 73.4 %, above CRATE-B; CBT-S 1.0 below ViT-S)",
        "ImageNet-1K results",
        ELSEWHERE,
        judges.not_run("ImageNet-1K, 150 epochs"),
    ),
    Claim(
        "accuracies after transfer to other data",
        "Appendix C",
        ELSEWHERE,
        judges.not_run("weights that were trained on ImageNet-1K"),
    ),
    Claim(
        "mean IoU as printed (1.5 above Segmenter)",
        "ADE20K results",
        ELSEWHERE,
        judges.not_run("ADE20K, 64 epochs, encoders trained on ImageNet"),
    ),
    Claim(
        "IoU of class-token maps as printed",
        "Tables 5, 6",
        ELSEWHERE,
        judges.not_run("PASCAL VOC12, models trained on ImageNet"),
    ),
)


def table() -> str:
    """The claims, a row each."""
    rows = []
    for number, claim in enumerate(CLAIMS, 1):
        finding = claim.judge() or Finding("not run yet", "cannot be told")
        rows.append(
            [str(number), claim.says, claim.where, f"{claim.setup.ran} (`{claim.setup.block}`)", *finding]
        )
    return markdown(["", "claim", "paper", "what was run (block)", "figure, 95 %", "verdict"], rows)


def write() -> None:
    """Draw the plots; write the table and the plots into the page."""
    for path in plots.write():
        print(path)
    text = DOCS.read_text()
    for (begin, end), content in ((TABLE, table()), (PICTURES, plots.pictures())):
        before, rest = text.split(begin)
        text = f"{before}{begin}{content}{end}{rest.split(end)[1]}"
    write_atomically(DOCS, text.encode())
    print(DOCS)
