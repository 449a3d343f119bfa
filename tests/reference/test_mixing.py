"""The restatements of mixing against the vectors recorded from the reference implementations."""

import numpy as np
import pytest

from tests import golden
from tests.reference import mixing

ATOL = 1e-6


def fields(vectors, case):
    prefix = f"{case}/"
    return {key.removeprefix(prefix): vectors[key] for key in vectors if key.startswith(prefix)}


def rows(vectors, table):
    names = str(vectors[f"{table}/table/cols"]).split(",")
    for row in vectors[f"{table}/table/vals"]:
        yield dict(zip(names, row, strict=True))


def cases(vectors, op):
    for case in golden.cases(vectors, f"{op}/", 2):
        case_fields = fields(vectors, case)
        if "input" in case_fields:
            case_fields["x"] = vectors[f"input/{case_fields['input']}"]
        yield case, case_fields


def test_mixup():
    vectors = golden.load("mixing/public_mixing")
    for case, v in cases(vectors, "mixup_openmixup"):
        out = mixing.mixup(v["x"], v["perm"], np.full(4, v["lam"]))
        np.testing.assert_allclose(out, v["out"], atol=ATOL, err_msg=case)
    onehot = np.eye(10)[vectors["input/y"]]
    for case, v in cases(vectors, "mixup_torchvision"):
        partner, lam = np.roll(np.arange(4), 1), np.full(4, v["lam"])
        out = mixing.mixup(v["x"], partner, lam)
        np.testing.assert_allclose(out, v["out"], atol=ATOL, err_msg=case)
        label = mixing.mix_labels(onehot, partner, lam)
        np.testing.assert_allclose(label, v["y_out"], atol=ATOL, err_msg=case)


def test_cutmix():
    vectors = golden.load("mixing/public_mixing")
    for case, v in cases(vectors, "cutmix_openmixup"):
        h, w = v["x"].shape[1:3]
        box = mixing.cutmix_box(h, w, float(v["lam"]), (int(v["row_center"]), int(v["col_center"])))
        np.testing.assert_array_equal(mixing.box_mask(h, w, box), 1 - v["mask"], err_msg=case)
        np.testing.assert_array_equal(mixing.cutmix(v["x"], v["perm"], [box] * 4), v["out"])
        np.testing.assert_allclose(mixing.box_lam(h, w, box), v["lam_out"], atol=ATOL)
    onehot = np.eye(10)[vectors["input/y"]]
    for case, v in cases(vectors, "cutmix_torchvision"):
        h, w = v["x"].shape[1:3]
        partner = np.roll(np.arange(4), 1)
        box = mixing.cutmix_box_torchvision(h, w, float(v["lam"]), (int(v["ry"]), int(v["rx"])))
        out = mixing.cutmix(v["x"], partner, [box] * 4)
        np.testing.assert_array_equal(out, v["out"], err_msg=case)
        label = mixing.mix_labels(onehot, partner, np.full(4, mixing.box_lam(h, w, box)))
        np.testing.assert_allclose(label, v["y_out"], atol=ATOL)


@pytest.mark.parametrize(
    ("table", "box_of", "given", "sides", "centre", "box", "lam"),
    [
        (
            "cutmix_official_bbox",
            mixing.cutmix_box,
            "lam",
            ("rows", "cols"),
            ("row_center", "col_center"),
            ("row1", "col1", "row2", "col2"),
            "lam_corrected",
        ),
        (
            "cutmix_timm_bbox",
            mixing.cutmix_box,
            "lam",
            ("H", "W"),
            ("cy", "cx"),
            ("yl", "xl", "yh", "xh"),
            "lam_corrected",
        ),
        (
            "cutmix_torchvision_bbox",
            mixing.cutmix_box_torchvision,
            "lam",
            ("H", "W"),
            ("ry", "rx"),
            ("y1", "x1", "y2", "x2"),
            "lam_adjusted",
        ),
    ],
)
def test_box_tables(table, box_of, given, sides, centre, box, lam):
    for row in rows(golden.load("mixing/public_mixing"), table):
        h, w = (int(row[name]) for name in sides)
        found = box_of(h, w, row[given], tuple(int(row[name]) for name in centre))
        assert found == tuple(int(row[name]) for name in box), row
        np.testing.assert_allclose(mixing.box_lam(h, w, found), row[lam], atol=ATOL)


def test_minmax_table():
    for row in rows(golden.load("mixing/public_mixing"), "cutmix_timm_minmax"):
        box = mixing.cutmix_box_minmax(*(int(row[k]) for k in ("cut_h", "cut_w", "yl", "xl")))
        assert box == tuple(int(row[k]) for k in ("yl", "xl", "yh", "xh")), row
        np.testing.assert_allclose(
            mixing.box_lam(int(row["H"]), int(row["W"]), box), row["lam"], atol=ATOL
        )


def test_resizemix():
    for case, v in cases(golden.load("mixing/public_mixing"), "resizemix_openmixup"):
        h, w = v["x"].shape[1:3]
        tau = float(np.clip(v["tau"], 0.1, 0.8))
        box = mixing.resizemix_box(h, w, tau, (int(v["cy"]), int(v["cx"])))
        resize = getattr(mixing, f"resize_{v['mode']}")
        out = mixing.resizemix(v["x"], v["perm"], [box] * 4, resize)
        # The reference computes its source coordinates in float32: 2e-6 of a pixel at 32.
        atol = 1e-5 if v["mode"] == "bilinear" else 0
        np.testing.assert_allclose(out, v["out"], rtol=0, atol=atol, err_msg=case)
        np.testing.assert_allclose(mixing.box_lam(h, w, box), v["lam_out"], atol=ATOL)


def timm_plan(v, size):
    """lam of the label, lam of the pixels and box of each example, from the recorded draws.

    Boxes were drawn in order for the examples that use CutMix; pairs share one draw.
    """
    mode, boxes = str(v["mode"]), [tuple(map(int, row)) for row in v["boxes"]]
    drawn = size if mode == "elem" else size // 2
    if v["lam"].ndim == 0:
        lam, use = np.full(size, v["lam"]), np.full(size, v["use_cutmix"])
        box = [boxes[0] if boxes else None] * size
    else:
        lam, use, box, left = list(v["lam"]), list(v["use_cutmix"]), [], list(boxes)
        for i in range(drawn):
            box.append(left.pop(0) if use[i] and lam[i] != 1 else None)
        assert not left
        if mode != "elem":
            lam, use, box = (list(a) + list(a)[::-1] for a in (lam[:drawn], use[:drawn], box))
    return np.asarray(lam, np.float64), np.asarray(use), box


@pytest.mark.parametrize("op", ["timm_mixup", "timm_fastcollate"])
def test_timm(op):
    vectors = golden.load("mixing/public_timm_mixup")
    for case, v in cases(vectors, op):
        x = v["x"]
        size, h, w = x.shape[:3]
        lam, use, box = timm_plan(v, size)
        partner = np.arange(size)[::-1]
        out, label_lam = mixing.mixup(x, partner, lam), lam.copy()
        for i in range(size):
            if use[i] and box[i] is not None:
                yl, yh, xl, xh = box[i]
                box[i] = (yl, xl, yh, xh)
                out[i] = mixing.cutmix(x, partner, [box[i]] * size)[i]
                if v.get("correct_lam", True):
                    label_lam[i] = mixing.box_lam(h, w, box[i])
        label = mixing.mix_labels(
            mixing.smooth_labels(vectors["input/y"], 10, float(v["label_smoothing"])),
            partner,
            label_lam,
        )
        if x.dtype == np.uint8:
            np.testing.assert_array_equal(out[: len(v["out"])], v["out"], err_msg=case)
        else:
            np.testing.assert_allclose(out, v["out"], atol=ATOL, err_msg=case)
        np.testing.assert_allclose(label[: len(v["y_out"])], v["y_out"], atol=ATOL, err_msg=case)


def test_fmix_grey():
    vectors = golden.load("mixing/public_fmix")
    for case, v in cases(vectors, "fmix"):
        shape = tuple(int(n) for n in v["shape"])
        np.testing.assert_allclose(mixing.fmix_frequencies(shape), v["freqs"], atol=1e-12)
        grey = mixing.fmix_grey(v["noise"], shape, float(v["decay"]))
        np.testing.assert_allclose(grey, v["grey"][0], atol=1e-9, err_msg=case)
    v = fields(vectors, "fmix_lastaxis_NOT_REFERENCE/32x32")
    grey = mixing.fmix_grey(v["noise"], (32, 32), mode="spectral")
    np.testing.assert_allclose(grey, v["grey"], atol=1e-9)


def test_fmix_masks():
    vectors = golden.load("mixing/public_fmix")
    for case, v in cases(vectors, "fmix_mask"):
        grey = vectors[f"fmix/{v['grey']}/grey"][0]
        mask = mixing.fmix_mask(grey, float(v["lam"]), float(v["max_soft"]), bool(v["ceil"]))
        np.testing.assert_allclose(mask, v["mask"].reshape(mask.shape), atol=1e-7, err_msg=case)
    x = vectors["input/x32"]
    for case, v in cases(vectors, "fmix_openmixup"):
        grey = mixing.fmix_grey(v["noise"], (32, 32))
        mask = mixing.fmix_mask(grey, float(v["lam"]), ceil=bool(v["ceil"]))
        np.testing.assert_array_equal(mask, v["mask"], err_msg=case)
        np.testing.assert_allclose(mixing.fmix(x, v["perm"], mask), v["out"], atol=ATOL)
