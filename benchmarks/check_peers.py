"""Which peers are here, and what of theirs is right: `python -m onepass.benchmarks.check_peers`, at the end of `make peers`."""

import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version

from . import catalogue
from .checks import as_tensors, standard_apart, wrong
from .providers import EAGER, PROVIDERS, Provider, UnavailableError
from .workloads import FAMILIES, Workload

assert catalogue


def verdict(provider: Provider, family: str) -> str:
    """Why the provider has no times at the family's smallest shape; empty if it is right, in all directions."""
    workload = Workload(family, FAMILIES[family].small).make()
    if reasons := provider.not_supported_reasons(workload):
        return "; ".join(reasons)
    (eager,) = (found for found in PROVIDERS if found.name == EAGER and family in found.families)
    exact = FAMILIES[family].expected(workload)
    for direction in FAMILIES[family].directions:
        try:
            runs = {found.name: found.prepare(workload, direction) for found in (eager, provider)}
        except UnavailableError as reason:
            return str(reason)
        results = {name: as_tensors(run()) for name, run in runs.items()}
        apart = {provider.name: standard_apart(workload, provider.keeps, direction)} if provider.keeps else {}
        problems = wrong(exact[direction], results, workload.dtype, apart)
        if provider.name in problems:
            return f"WRONG, {direction}: {problems[provider.name]}"
    return ""


def lines() -> Iterator[str]:
    """One for each peer and family."""
    for provider in PROVIDERS:
        for module in list(provider.needs)[:1]:
            package = next(iter(packages_distributions().get(module, [])), None)
            name = f"{provider.name} ({package} {version(package)})" if package else provider.name
            for family in sorted(provider.families):
                yield f"{name}, {family}: {verdict(provider, family) or 'right'}"


def main() -> int:
    found = list(lines())
    print("\n".join(found))
    return 0 if all(line.endswith(": right") for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
