"""Made-up tables in the shapes of well-known logs, for data_loaders.inspect: each a function (folder, rows) -> path. Nothing of the code under
test is imported. Every value is drawn from a fixed seed."""

import csv
import gzip
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

GENRES = "Action Adventure Animation Children Comedy Crime Drama Fantasy Horror Musical Mystery Romance Sci-Fi Thriller War Western".split()
WORDS = "the a this product arrived late but works well and I like its colour very much for my kitchen money back never again great thing".split()
AGENTS = [
    f"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.{i} (KHTML, like Gecko) Chrome/{60 + i}.0 Safari/537.{i}" for i in range(40)
]  # fmt: skip


def zipf(rng: np.random.Generator, distinct: int, n: int, s: float = 1.1) -> np.ndarray:
    weights = (np.arange(distinct) + 1.0) ** -s
    return rng.choice(distinct, n, p=weights / weights.sum())


def hashed(numbers: np.ndarray, salt: int) -> list[str]:
    return [f"{(int(x) + 1 + salt) * 2654435761 % 2**32:08x}" for x in numbers]


def write(path: Path, rows: list, header: list[str] | None = None, delimiter: str = ",", zipped: bool = False) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if zipped else data)
    return path


def avazu(folder: Path, n: int) -> Path:
    """id (unique), click, hour as YYMMDDHH, integers and 8-digit hashes."""
    rng = np.random.default_rng(1)
    hours = [(datetime(2014, 10, 21) + timedelta(hours=int(h))).strftime("%y%m%d%H") for h in np.sort(rng.integers(0, 240, n))]
    columns = [
        [str(int(x)) for x in rng.integers(10**18, 9 * 10**18, n)], rng.binomial(1, 0.17, n), hours, 1001 + zipf(rng, 7, n), zipf(rng, 7, n),
        hashed(zipf(rng, 900, n), 0), hashed(zipf(rng, 800, n), 7), hashed(zipf(rng, 5000, n, 0.8), 9), hashed(zipf(rng, 8000, n, 0.7), 11),
        zipf(rng, 5, n), 15700 + zipf(rng, 300, n), rng.choice([320, 300, 216], n), rng.choice([50, 250, 36], n),
    ]  # fmt: skip
    header = "id click hour C1 banner_pos site_id app_id device_id device_ip device_type C14 C15 C16".split()
    return write(folder / "avazu.csv", list(zip(*columns, strict=True)), header)


def movielens(folder: Path, n: int) -> Path:
    """userId, movieId, rating in halves, epoch seconds, genres between bars, a title."""
    rng = np.random.default_rng(2)
    movie = zipf(rng, 400, n)
    genres = ["|".join(rng.choice(GENRES, rng.integers(1, 5), replace=False)) for _ in range(400)]
    rows = [
        (u, m + 1, r, t, f"The {GENRES[m % 16]}, Part {m} ({1950 + m % 60})", genres[m])
        for u, m, r, t in zip(zipf(rng, 600, n, 0.5) + 1, movie, rng.integers(1, 11, n) / 2, rng.integers(8e8, 1.5e9, n), strict=True)
    ]
    return write(folder / "ratings.csv", rows, ["userId", "movieId", "rating", "timestamp", "title", "genres"])


def taobao(folder: Path, n: int) -> Path:
    """No header: user, item, category, behaviour, epoch seconds."""
    rng = np.random.default_rng(3)
    kinds = rng.choice(["pv", "cart", "fav", "buy"], n, p=[0.89, 0.05, 0.03, 0.03])
    times = 1511539200 + np.sort(rng.integers(0, 9 * 86400, n))
    rows = list(zip(zipf(rng, 3000, n, 0.6) + 100, zipf(rng, 9000, n) + 5000, zipf(rng, 300, n) + 4_000_000, kinds, times, strict=True))
    return write(folder / "UserBehavior.csv", rows)


def alibaba(folder: Path, n: int) -> Path:
    """user, time_stamp, adgroup_id, pid, nonclk (the label's opposite), clk."""
    rng = np.random.default_rng(4)
    clk = rng.binomial(1, 0.05, n)
    times = 1494000000 + rng.integers(0, 7 * 86400, n)
    pid = rng.choice(["430539_1007", "430548_1007"], n)
    rows = list(zip(zipf(rng, 4000, n, 0.4), times, zipf(rng, 2000, n), pid, 1 - clk, clk, strict=True))
    return write(folder / "raw_sample.csv", rows, ["user", "time_stamp", "adgroup_id", "pid", "nonclk", "clk"])


def reviews(folder: Path, n: int) -> Path:
    """Amazon's or Yelp's: review_id, ids, stars, useful, free text with commas, quotes and line ends, an ISO date."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(n):
        text = " ".join(rng.choice(WORDS, rng.integers(8, 60))) + f', said "{i}"' + ("\n\nand, so, on" if i % 3 else "")
        date = (datetime(2010, 1, 1) + timedelta(minutes=int(rng.integers(0, 3_000_000)))).strftime("%Y-%m-%d %H:%M:%S")
        ids = f"r{i * 7919:022x}", f"u{zipf(rng, 500, 1)[0]:021x}", f"b{i % 97:021x}"
        rows.append((*ids, f"{rng.integers(1, 6)}.0", zipf(rng, 30, 1)[0], text, date))
    return write(folder / "reviews.csv", rows, ["review_id", "user_id", "business_id", "stars", "useful", "text", "date"])


def outbrain(folder: Path, n: int) -> Path:
    """gzip: display_id, ad_id, clicked, uuid, relative milliseconds, platform with \\N, geo."""
    rng = np.random.default_rng(6)
    rows = [
        (d, a, c, f"{u:014x}", t, p, g)
        for d, a, c, u, t, p, g in zip(
            np.arange(n) // 4 + 1, zipf(rng, 700, n) + 1, rng.binomial(1, 0.2, n), zipf(rng, 900, n) * 999331, np.sort(rng.integers(61, 10**9, n)),
            rng.choice(["1", "2", "3", "\\N"], n), rng.choice(["US>CA>803", "GB>H9", "US", "", "CA>ON"], n), strict=True,
        )
    ]  # fmt: skip
    return write(folder / "clicks.csv.gz", rows, ["display_id", "ad_id", "clicked", "uuid", "timestamp", "platform", "geo_location"], zipped=True)


def web(folder: Path, n: int) -> Path:
    """TSV: pandas' index, ISO time, IP, user agent, True/False, yes/no label, float counts, price, tags, list, list of commas, constant."""
    rng = np.random.default_rng(7)
    start = datetime(2020, 5, 1, tzinfo=UTC)
    rows = []
    for i in range(n):
        time = (start + timedelta(seconds=37 * i)).strftime("%Y-%m-%dT%H:%M:%SZ")
        ip = ".".join(map(str, (10, 0, zipf(rng, 9, 1)[0], zipf(rng, 200, 1)[0])))
        seen = "" if rng.random() < 0.2 else f"{float(zipf(rng, 500, 1, 1.3)[0])}"
        tags = " ".join(f"tag{t}" for t in rng.choice(30, rng.integers(1, 6), replace=False))
        items = [int(x) for x in zipf(rng, 200, int(rng.integers(0, 8)))]
        shops = ",".join(str(x) for x in zipf(rng, 100, int(rng.integers(1, 4))))
        agent = AGENTS[zipf(rng, 40, 1)[0]]
        yes = "yes" if rng.random() < 0.1 else "no"
        price = round(float(np.exp(rng.normal(3, 1.5))), 2)
        rows.append((i, time, ip, agent, str(rng.random() < 0.5), yes, seen, price, tags, items, shops, "eu-1"))
    header = ["", "ts", "ip", "user_agent", "is_mobile", "converted", "visits", "price", "tags", "history", "shops", "datacenter"]
    return write(folder / "web.tsv", rows, header, delimiter="\t")


def millis(folder: Path, n: int) -> Path:
    """No header, bars: 0/1 first, epoch milliseconds, UUIDs, ids."""
    rng = np.random.default_rng(8)
    rows = []
    for i in range(n):
        uuid = f"{i * 2654435761 % 2**32:08x}-aaaa-4bbb-8ccc-{i:012x}"
        rows.append((rng.binomial(1, 0.3), 1_600_000_000_000 + i * 977, uuid, zipf(rng, 50, 1)[0] + 100, round(rng.normal(0, 3), 4)))
    return write(folder / "events.psv", rows, delimiter="|")


def unlabelled(folder: Path, n: int) -> Path:
    """movies.csv: nothing that looks like a label."""
    rng = np.random.default_rng(9)
    rows = [(i + 1, f"A Film of {i}", "|".join(rng.choice(GENRES, rng.integers(1, 4), replace=False))) for i in range(n)]
    return write(folder / "movies.csv", rows, ["movieId", "title", "genres"])


def arrow(folder: Path, n: int) -> Path:
    """Parquet of several row groups: booleans, lists, timestamps, dictionaries, floats with NaN, a struct."""
    rng = np.random.default_rng(10)
    time = pa.array((np.datetime64("2021-03-01") + np.arange(n).astype("timedelta64[m]")).astype("datetime64[us]"))
    history = [list(map(int, zipf(rng, 300, int(rng.integers(0, 6))))) for _ in range(n)]
    age = np.where(rng.random(n) < 0.1, np.nan, rng.normal(40, 9, n))
    table = pa.table({
        "event_time": time, "user_id": zipf(rng, 1000, n), "history": pa.array(history, pa.list_(pa.int64())),
        "country": pa.array(rng.choice(["US", "DE", "NA", "FR"], n)).dictionary_encode(), "age_years": age,
        "geo": pa.array([{"lat": 1.0}] * n), "embedding": pa.array(list(rng.normal(0, 1, (n, 4)).round(3).tolist())),
        "label": rng.random(n) < 0.25,
    })  # fmt: skip
    parquet.write_table(table, folder / "log.parquet", row_group_size=max(1, n // 5))
    return folder / "log.parquet"


def criteo(folder: Path, n: int, name: str = "train.txt") -> Path:
    rng = np.random.default_rng(11)
    columns = [rng.binomial(1, 0.25, n)]
    columns += [["" if rng.random() < 0.2 else int(x) for x in np.exp(rng.normal(2, 1.5, n))] for _ in range(13)]
    columns += [["" if rng.random() < 0.1 else x for x in hashed(zipf(rng, size, n), size)] for size in (3, 20, 400, 3000) * 6 + (5, 9)]
    return write(folder / name, list(zip(*columns, strict=True)), delimiter="\t")


ALL = (avazu, movielens, taobao, alibaba, reviews, outbrain, web, millis, unlabelled, arrow, criteo)
