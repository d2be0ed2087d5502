"""Measure tokens per second and read the result.

With more than one process, measure below `if __name__ == "__main__"`: they import this file.
"""

from openelm_mlx.benchmarks.measure.run import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions

options = BenchmarkOptions(prompt_tokens=(16,), generation_tokens=(16,), trials=5, processes=1)
for row in run(options).rows:
    rate = row.metrics["decode_tokens_per_second"]
    print(f"{row.case.model}: {rate.median:.0f} tokens/s, spread {rate.spread:.1%}")
