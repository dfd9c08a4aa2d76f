"""The two-pass shuffle of upstream's --memory-map, restated one row at a time; imports none of our code."""

import numpy as np


def reordered(total_per_file: list[int], randomize: str, rng: np.random.RandomState) -> list[int]:
    """Row numbers of all days in their new order. randomize "total" first deals the rows of every day but the last out to those days."""
    num_days, last = len(total_per_file), len(total_per_file) - 1
    boxes, row = [[] for _ in total_per_file], 0
    for day, size in enumerate(total_per_file):
        draws = rng.randint(low=0, high=last, size=size) if randomize == "total" else None
        for position in range(size):
            box = day
            if draws is not None and day < last:
                box = draws[position]
                while len(boxes[box]) >= total_per_file[box]:
                    box = rng.randint(low=0, high=last)
            boxes[box].append(row)
            row += 1
    for day in range(num_days):
        if randomize != "none" and day < last:
            boxes[day] = [boxes[day][i] for i in rng.permutation(range(total_per_file[day]))]
    return [row for box in boxes for row in box]
