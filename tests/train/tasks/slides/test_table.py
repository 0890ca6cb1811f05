"""The table of slides: columns by name alone, and no patient in two splits."""

import pytest

from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.slides.config import SlidesDataConfig
from cbsa_torch.train.tasks.slides.table import Row, assign_splits, read_table


def table(tmp_path, text, **settings):
    (tmp_path / "slides.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    return read_table(SlidesDataConfig(root=str(tmp_path), **settings))


def test_columns_are_found_by_name(tmp_path):
    text = "age,label,slide,split,patient\n 7, a ,s1,train,p\n9,b,s2,test,q\n"
    expected = [Row("s1", "a", "p", "train"), Row("s2", "b", "q", "test")]
    assert table(tmp_path, text).rows == expected
    renamed = text.replace("slide,", "slide_id,").replace("patient", "case_id")
    names = {"slide_column": "slide_id", "patient_column": "case_id"}
    assert table(tmp_path, renamed, **names).rows == expected
    assert table(tmp_path, renamed, slide_column="slide_id").rows[0].patient == "s1"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("slide_id,label\na,b", {}, "no column 'slide' .data.slide_column.; it has slide_id, label; did you mean 'slide_id'"),
        ("slide,label\na,b", {"split_column": "fold"}, "no column 'fold' .data.split_column."),
        ("slide,label\na,b\nc,", {}, "line 3: no label"),
        ("slide,label,patient\na,b", {}, "line 2: no patient"),
        ("slide,label,split\na,b,valid", {}, "line 2: split must be one of train, val, test, got 'valid'; did you mean 'val'"),
        ("slide,label\na,b\na,c", {}, "slide 'a' is there twice$"),
        ("slide,label\na,b\n./a.h5,b", {}, "slide './a.h5' is there twice, also as 'a'"),
        ("slide,label,label\na,b,c", {}, "2 columns 'label'"),
        ("slide,label,patient\na,carcinoma, NOS,p", {}, "line 2: more cells than the 3 of the heading"),
        ("slide,label,patient,split\na,b,p,train\nc,b,p,test", {}, "patient 'p' is in two splits, train and test"),
        ("slide,label\n", {}, "lists no slides"),
    ],
)  # fmt: skip
def test_a_bad_table_is_named(text, settings, message, tmp_path):
    with pytest.raises(DataError, match=f"slides.csv.*{message}"):
        table(tmp_path, text, **settings)


def test_without_a_table_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of slides at .*slides.csv .data.csv"):
        read_table(SlidesDataConfig(root=str(tmp_path)))
    with pytest.raises(ConfigError, match="data.root must name the folder"):
        read_table(SlidesDataConfig())


def patients(rows):
    return {row.patient for row in rows}


def test_splits_are_drawn_by_patient_and_label_with_the_seed():
    rows = [Row(f"s{i}", "ab"[i % 8 == 0], f"p{i // 2}", None) for i in range(200)]
    config = SlidesDataConfig(val_fraction=0.2, test_fraction=0.25)
    splits = assign_splits(rows, config, 3)
    assert sorted(row for part in splits.values() for row in part) == sorted(rows)
    parts = list(map(patients, splits.values()))
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    # 75 patients with a alone, 25 with both: a quarter of each for the test, a fifth of the rest for validation
    counts = {name: (len(patients(part)), sum(r.label == "b" for r in part)) for name, part in splits.items()}
    assert counts == {"train": (60, 15), "val": (15, 4), "test": (25, 6)}
    assert assign_splits(rows, config, 3) == splits
    assert assign_splits(rows, config, 4) != splits


def test_given_splits_stay_and_validation_is_drawn_where_there_is_none():
    rows = [Row(f"s{i}", "ab"[i % 2], f"s{i}", "test" if i < 6 else "train") for i in range(26)]
    splits = assign_splits(rows, SlidesDataConfig(val_fraction=0.2), 0)
    assert splits["test"] == rows[:6]
    assert {name: len(part) for name, part in splits.items()} == {"train": 16, "val": 4, "test": 6}
