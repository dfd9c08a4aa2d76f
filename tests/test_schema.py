"""The schema of a user's table: what it says, what it refuses, and that what is written is what is read."""

import pytest

from data_loaders.schema import CategoricalColumn, DenseColumn, LabelColumn, Schema, SplitBy
from dlrm_xla.specs import UserError

SHORTEST = "label: {column: click}\ncategorical:\n  - {column: user, type: integer}\n"
WHOLE = """\
# a comment
format: csv
delimiter: "\\t"
header: true
quote: '"'
encoding: latin-1
missing: ["", NO, "\\\\N"]
label: {column: rating, positive: ">= 4"}
dense:
  - {column: price, transform: log}
  - column: age
categorical:
  - {column: user, type: integer}
  - {column: "genres (all)", type: string, separator: "|", max_hot: 10}
  - {column: site, type: hex, max_ind_range: 100000}
split: {by: time, column: ts, test: 0.25}
"""


@pytest.fixture
def read(tmp_path):
    def of(text: str | bytes) -> Schema:
        path = tmp_path / "schema.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Schema.read(path)

    return of


@pytest.fixture
def refused(read):
    """refused(text) -> the one line that reading it ends with."""

    def of(text: str | bytes) -> str:
        with pytest.raises(UserError) as error:
            read(text)
        assert "\n" not in str(error.value)
        return str(error.value)

    return of


def test_the_shortest_schema(read):
    schema = read(SHORTEST)
    assert schema.label == LabelColumn("click") and schema.dense == () and schema.split == SplitBy("fraction", 0.1)
    assert schema.categorical == (CategoricalColumn("user", "integer"),)
    assert (schema.format, schema.delimiter, schema.header, schema.quote, schema.encoding) == (None,) * 5


def test_every_entry(read):
    assert read(WHOLE) == Schema(
        LabelColumn("rating", ">= 4"),
        (
            CategoricalColumn("user", "integer"),
            CategoricalColumn("genres (all)", "string", "|", 10),
            CategoricalColumn("site", "hex", max_ind_range=100000),
        ),
        (DenseColumn("price", "log"), DenseColumn("age")),
        SplitBy("time", 0.25, "ts"),
        "csv", "\t", True, '"', "latin-1", (), ("", "NO", "\\N"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "attribute", "value"),
    [
        ('delimiter: "\\x01"', "delimiter", "\x01"),
        ("delimiter: '\\x01'", "delimiter", "\x01"),
        ("delimiter: \\t", "delimiter", "\t"),
        ("quote: none", "quote", ""),
        ("header: False", "header", False),
        ("missing: []", "missing", ()),
        ("columns: [a, yes, 7]", "columns", ("a", "yes", "7")),
        ("split: {by: file, test: [day_6.csv, 'x*']}", "split", SplitBy("file", 0.0, files=("day_6.csv", "x*"))),
        ("split: {by: time, column: ts, start: 2014-10-30}", "split", SplitBy("time", 0.0, "ts", "2014-10-30")),
    ],
)
def test_entries(read, entry, attribute, value):
    assert getattr(read(f"{SHORTEST}{entry}\n"), attribute) == value


@pytest.mark.parametrize(("positive", "value"), [("[pv, buy]", ("pv", "buy")), ("buy", ("buy",)), ('"<1.5"', "<1.5"), ("[4, 5]", ("4", "5"))])
def test_what_counts_as_1(read, positive, value):
    assert read(SHORTEST.replace("click", f"click, positive: {positive}")).label.positive == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORTEST + "splitt: {by: fraction}\n", "line 4: the schema: unknown key 'splitt'; did you mean split?"),
        (SHORTEST + "zzz: 1\n", "line 4: the schema: unknown key 'zzz'; it knows format, delimiter"),
        (SHORTEST + "label: {column: b}\n", "line 4: the schema: label is there twice (also line 1)"),
        (SHORTEST.replace("type: integer", "typ: integer"), "line 3: a categorical column: unknown key 'typ'; did you mean type?"),
        (SHORTEST.replace("type: integer", "type: int"), "line 3: type: 'int' is unknown; choose integer or hex or string (did you mean integer?)"),
        (SHORTEST.replace(", type: integer", ""), "line 3: a categorical column lacks type:"),
        ("categorical:\n  - {column: a, type: hex}\n", "line 1: the schema lacks label:"),
        ("label: {column: a}\n", "line 1: the schema lacks categorical:"),
        ("label: {column: a}\ncategorical: []\n", "line 2: categorical: no column; DLRM needs at least one"),
        ("label: {column: a}\ncategorical: b\n", "line 2: categorical: must be a list"),
        ("label: {column: a}\ncategorical: [b]\n", "line 2: a categorical column must have keys and values"),
        (SHORTEST.replace("{column: click}", "click"), "line 1: label must have keys and values (column, positive), as {column: click}"),
        (SHORTEST.replace("click", ""), "line 1: column: nothing behind it"),
        (SHORTEST.replace("click", "[a]"), "line 1: column: must be a single text"),
        (SHORTEST.replace("click", 'click, positive: "=> 4"'), "line 1: positive: '=> 4' is no rule"),
        (SHORTEST.replace("click", 'click, positive: ">= x"'), "line 1: positive: '>= x' is no rule"),
        (SHORTEST + "  - {column: click, type: string}\n", "line 4: column 'click' is the label (line 1)"),
        (SHORTEST + "  - {column: user, type: string}\n", "line 4: column 'user' is in categorical: already (line 3)"),
        (SHORTEST + "dense: [{column: a}, {column: a}]\n", "line 4: column 'a' is in dense: already (line 4)"),
        (SHORTEST + "dense: [{column: a, transform: ln}]\n", "line 4: transform: 'ln' is unknown; choose none or log or standardize"),
        (SHORTEST + "dense: []\n", "line 4: dense: the list is empty"),
        (SHORTEST + "format: xls\n", "line 4: format: 'xls' is unknown; choose csv or tsv or parquet"),
        (SHORTEST + 'delimiter: "::"\n', "line 4: delimiter: '::' is not one ASCII character"),
        (SHORTEST + "delimiter: é\n", "is not one ASCII character"),
        (SHORTEST + "header: yes\n", "line 4: header: 'yes' is neither true nor false"),
        (SHORTEST + "encoding: utf8\n", "choose utf-8 or latin-1 (did you mean utf-8?)"),
        (SHORTEST + "quote: '\"\"'\n", "is not one ASCII character"),
        (SHORTEST + "delimiter: '|'\nquote: '|'\n", "line 5: quote: '|' is the delimiter too"),
        (SHORTEST + "format: tsv\ndelimiter: ','\n", "line 5: delimiter: ',', but format: tsv has tabs"),
        (SHORTEST + "format: parquet\nheader: true\n", "line 5: header: is for text"),
        (SHORTEST + "columns: [a, b, a]\n", "line 4: columns: 'a' is there twice"),
        (SHORTEST + "header: true\ncolumns: [a]\n", "line 5: columns: is for files without a header"),
        (SHORTEST + "split: {by: day}\n", "line 4: by: 'day' is unknown; choose time or fraction or file"),
        (SHORTEST + "split: {by: fraction, test: 1}\n", "line 4: test: '1' is not a share of the rows"),
        (SHORTEST + "split: {by: fraction, test: 10%}\n", "test: '10%' is not a share"),
        (SHORTEST + "split: {by: time}\n", "split by time needs a column"),
        (SHORTEST + "split: {by: file}\n", "split by file needs test:"),
        (SHORTEST + "split: {by: fraction, column: ts}\n", "column: is for by: time"),
        (SHORTEST + "split: {by: time, column: ts, test: 0.1, start: 5}\n", "start: and test: both say"),
        (SHORTEST.replace("integer", "integer, max_hot: -1"), "max_hot: '-1' is not a whole number from 0"),
        (SHORTEST.replace("integer", "integer, max_ind_range: 9999999999"), "max_ind_range: '9999999999' is not a whole number from 0"),
        (SHORTEST.replace("integer", 'integer, separator: "\\n"'), "separator: a line end cannot stand"),
        ("format: csv\n" + SHORTEST.replace("integer", "integer, max_hot: 3"), "line 4: column 'user': max_hot is for bags"),
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "line 1: the schema must have keys and values"),
        ("label: {column: a\n", "line 2: not YAML"),
        ("label: 'a\n", "not YAML"),
        (SHORTEST + "---\n" + SHORTEST, "not YAML"),
        ("a: *b\n", "not YAML"),
        ("label: \x07\n", "not YAML"),
        (b"label: \xff\xfe\n", "not UTF-8"),
        ("[" * 3000, "not YAML"),
    ],
)
def test_refusals(refused, text, message):
    assert message in refused(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--schema=.*none.yaml: cannot read it: No such file"):
        Schema.read(tmp_path / "none.yaml")


def test_what_is_written_is_what_is_read(read):
    odd = Schema(
        LabelColumn("a: b", ("yes", "#1", "é", "")),
        (CategoricalColumn('say "hi"', "string", "\x01", 3, 7), CategoricalColumn("- x", "hex"), CategoricalColumn("null", "integer")),
        (DenseColumn(" blank ", "standardize"), DenseColumn("{c}")),
        SplitBy("file", 0.0, files=("a, b.csv", "*.gz")),
        "csv", "\x01", False, "", "utf-8", ("a: b", "true", "7", "c\td", "[x]"), ("", "~", "\\N", "null"),
    )  # fmt: skip
    for schema in (odd, read(WHOLE), read(SHORTEST), read(SHORTEST + "split: {by: time, column: ts, start: 2014-10-30}\n")):
        again = read(schema.to_yaml({"user": "12 ids\nin all"}))
        assert again == schema and again.fingerprint() == schema.fingerprint()


def test_the_fingerprint_is_of_what_is_said(read):
    schema = read(SHORTEST)
    assert read("categorical: [{type: integer, column: user}]\n\n# other words\nlabel:\n  column: click\n").fingerprint() == schema.fingerprint()
    assert read(SHORTEST.replace("integer", "string")).fingerprint() != schema.fingerprint()
    assert len(schema.fingerprint()) == 64
