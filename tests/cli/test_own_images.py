from __future__ import annotations

import json

import numpy as np
from PIL import Image

from grood_cert.data import load_set


def test_a_folder_with_splits_from_training_to_certification(call, tmp_path):
    """What became which part, and what was done to images, is said by each command and kept in the manifest."""
    digits = load_set("digits:0,1")
    for part, start in (("train", 0), ("val", 120), ("test", 180)):
        for index in range(start, start + 60 + 60 * (part == "train")):
            path = tmp_path / "own" / part / str(int(digits.labels[index])) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index, 0] * 255).round().byte().numpy()).save(path)
    (tmp_path / "own/train/0/moving.gif").write_bytes(b"GIF89a")
    (tmp_path / "others").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"others/{index}.png")
    settings = (f"data.id={tmp_path / 'own'}", f'data.ood=["{tmp_path / "others"}"]', "optimizer.epochs=1")
    run = tmp_path / "run"
    code, _, err = call("train", "digits-greg", "--out", run, *(x for text in settings for x in ("--set", text)))
    parts = (
        "ID images: 120 to train on from 'own', split 'train'; 60 for calibration from its split 'val'; "
        "60 for test from its split 'test'"
    )
    fitted = "3 of 3 images made grey from RGB; 3 of 3 images fitted to 8x8"
    lines = (parts, "'own': files left out: 1 .gif", f"'others': {fitted}")
    assert code == 0 and all(line in err.splitlines() for line in lines)
    code, _, err = call("certify", run / "model.pt", "--eps", "0.01", "--limit", "1", "--effort", "fast", "--no-figure")
    assert code == 0 and all(line in err.splitlines() for line in lines)
    own, others = json.loads((run / "rows.json").read_text())["data"]
    assert (own["set"], own["images"], "note" in own) == ("own", 60, False)
    assert (others["set"], others["images"], others["note"]) == ("others", 3, fitted)
    assert ",test/" in (run / "rows.csv").read_text()
