"""A synthetic review data set with a tokenizer of its own, for demos and tests that need no network.

The reviews are composed by a small grammar, not written by people: a result on them says that the
machinery works, nothing about real text. Counting words does not solve them, because negation, contrast,
disappointed expectations and other people's opinions put the words of one class into the other.

The splits tell the usual story of distillation: the teacher had many labels, the student's team has a few
noisy ones and a large unlabelled pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from string import ascii_lowercase, digits, whitespace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
Rows = list[dict[str, Any]]

LABEL_NAMES = ["negative", "positive"]
UNLABELED = -1

# Rows per split. Splits are filled in this order and each text is used once: the sets that are measured on
# come first, so they stay the same for a seed whatever the size of the training splits.
SPLITS = {"test": 2000, "validation": 400, "train": 1000, "unlabeled": 8000, "teacher_train": 32000}

# Share of rows whose label is flipped; a split that is not named has none.
LABEL_NOISE = {"train": 0.1, "teacher_train": 0.02}

# How often a phenomenon occurs. With more negation, contrast and other people's opinions, bags of words do
# worse, and a small transformer needs more rows and steps to do better.
_NEGATED = 0.3  # of the judgements
_CLOSED = 0.3  # of the reviews
_WITH_FACT = 0.3  # of the reviews
_VERDICT_KINDS = ("clause",) * 6 + ("contrast",) * 2 + ("expectation", "counterfactual")
_N_VERDICTS = (1, 1, 1, 2)
_N_DISTRACTORS = (0, 0, 0, 0, 1)
_MAX_SENTENCES = 4

# Domain -> what is reviewed.
_THINGS = {
    "movie": "film,movie,thriller,comedy,drama,sequel,western,documentary".split(","),
    "product": "kettle,lamp,keyboard,toaster,backpack,speaker,camera,vacuum cleaner".split(","),
    "restaurant": "restaurant,bistro,diner,pizzeria,tavern,noodle bar,steakhouse,canteen".split(","),
}
_TRIED = {"movie": "saw", "product": "owned", "restaurant": "tried"}

# Domain -> aspect|words against it|words for it.
_WORDS = {
    "movie": "plot|predictable,thin,confusing|gripping,clever,surprising;acting|wooden,lifeless,stiff|"
    "convincing,heartfelt,lively;music|grating,monotonous,intrusive|haunting,catchy,stirring;pacing|"
    "sluggish,uneven,plodding|brisk,tight,energetic;dialogue|clumsy,stilted,corny|witty,sharp,snappy;"
    "ending|rushed,absurd,hollow|touching,powerful,uplifting;camera work|shaky,murky,amateurish|"
    "elegant,inventive,graceful;humour|stale,childish,forced|hilarious,subtle,warm;story|dull,boring,"
    "shallow|moving,thrilling,rich;cast|bland,unconvincing,miscast|charismatic,gifted,likeable",
    "product": "battery|feeble,unreliable,defective|dependable,powerful,durable;build quality|flimsy,shoddy,"
    "cheap|sturdy,solid,rugged;design|ugly,bulky,dated|elegant,sleek,clever;manual|confusing,useless,cryptic|"
    "clear,thorough,helpful;handle|slippery,wobbly,awkward|comfortable,firm,ergonomic;finish|scratched,"
    "blotchy,crude|smooth,immaculate,polished;packaging|wasteful,damaged,clumsy|neat,tidy,clever;app|"
    "buggy,sluggish,clunky|intuitive,responsive,stable;performance|erratic,sluggish,noisy|fast,quiet,"
    "consistent;customer support|rude,slow,unhelpful|patient,prompt,courteous",
    "restaurant": "service|rude,slow,careless|friendly,attentive,prompt;soup|watery,salty,lukewarm|fragrant,"
    "hearty,delicious;wine list|short,overpriced,uninspired|varied,affordable,exciting;dessert|soggy,sickly,"
    "stale|luscious,delicate,heavenly;bread|stale,dry,burnt|fresh,crusty,fluffy;menu|limited,confusing,"
    "dated|varied,inventive,tempting;atmosphere|noisy,gloomy,cold|cosy,welcoming,relaxed;pasta|rubbery,"
    "bland,overcooked|tender,savoury,delicious;coffee|bitter,weak,burnt|smooth,strong,aromatic;room|"
    "cramped,dirty,draughty|spacious,spotless,bright",
}
_ASPECTS = {
    domain: {aspect: (against.split(","), praise.split(",")) for aspect, against, praise in lines}
    for domain, lines in ((d, [line.split("|") for line in words.split(";")]) for d, words in _WORDS.items())
}

# Pairs are (negative, positive) throughout, so that a label indexes them.
_ADJECTIVES = (
    "bad,awful,terrible,poor,dreadful,disappointing,horrible,mediocre,lousy,unpleasant,dismal,tedious,"
    "miserable,annoying".split(","),
    "good,great,excellent,wonderful,superb,impressive,delightful,brilliant,outstanding,fantastic,pleasant,"
    "splendid,remarkable,satisfying".split(","),
)
_VERBS = (  # (past tense, infinitive)
    (("hated", "hate"), ("disliked", "dislike"), ("loathed", "loathe"), ("detested", "detest")),
    (("loved", "love"), ("liked", "like"), ("enjoyed", "enjoy"), ("admired", "admire")),
)
_NOUNS = (
    "flaws,faults,problems,shortcomings,weaknesses,defects".split(","),
    "charm,character,class,merit,appeal,style".split(","),
)
_INTENSIFIERS = ",,,really,truly,quite,simply,clearly".split(",")
# These look like negations and are none.
_AFFIRMATIONS = "without doubt,nothing short of,beyond question,undeniably,never less than".split(",")
_NEGATIONS = "not,not,not at all,never,hardly,by no means,far from,anything but".split(",")
_CALLED = ("anyone would call", "I can only call", "I have to call")
_NOT_CALLED = ("nobody could call", "I would not call", "I cannot call")
_COUNTERFACTUALS = (
    ("I wish the {} had been {}", "the {} should have been {}", "if only the {} had been {}"),
    ("I am glad the {} was not {}", "luckily the {} was not {}", "it is a relief that the {} was not {}"),
)
_CLOSINGS = {
    "any": ("I want my money back;I cannot recommend it", "it is worth every penny;I can only recommend it"),
    "movie": ("I left early;do not waste an evening on it", "I would watch it again;it deserves a prize"),
    "product": ("I sent it back;do not waste money on it", "I would buy it again;do not hesitate"),
    "restaurant": ("I will not return;do not waste money there", "I will be back;do not miss it"),
}

_PEOPLE = (
    "my brother,my sister,my neighbour,a colleague,my flatmate,my uncle,the local paper,an old friend,"
    "one blogger,my boss,the man next to me,my cousin".split(",")
)
_FACTS = {
    "movie": "I saw the {thing} on a {day} {time};the {thing} runs for about two hours;it was shot in "
    "{number} countries;we watched it at home on a {day};there were {number} people in the cinema",
    "product": "the {thing} arrived on a {day} {time};I ordered the {thing} {number} weeks ago;I have used "
    "it every {day} since;it comes in {number} colours;it replaces one that I had for {number} years",
    "restaurant": "we went there on a {day} {time};the {thing} is {number} minutes from the station;we had "
    "booked a table for a {day};the {thing} opened {number} months ago;there were {number} of us",
}
_DAYS = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday".split(",")
_TIMES = "morning,afternoon,evening,night".split(",")
_NUMBERS = "two,three,four,five,six,seven,eight,nine,ten,twelve".split(",")


class _Review:
    """Composes one review of one thing. A ``label`` is what the words, taken together, say: 0 or 1."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.domain = self.pick(tuple(_THINGS))
        self.thing = self.pick(_THINGS[self.domain])
        # Each aspect is judged once, so a review cannot contradict itself.
        self.aspects = sorted(_ASPECTS[self.domain], key=lambda _: rng.random())

    def pick(self, options: Sequence[_T]) -> _T:
        # Of Random's methods only random() promises the same sequence in every version of Python.
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def adjective(self, aspect: str, label: int) -> str:
        return self.pick(_ASPECTS[self.domain][aspect][label] if self.chance(0.5) else _ADJECTIVES[label])

    def text(self, label: int) -> str:
        parts = [self.verdict(label) for _ in range(self.pick(_N_VERDICTS))]
        parts += [self.distractor() for _ in range(self.pick(_N_DISTRACTORS))]
        if self.chance(_WITH_FACT):
            parts.append(self.fact())
        parts.sort(key=lambda _: self.rng.random())
        if self.chance(_CLOSED):
            parts.append(self.pick(_CLOSINGS[self.pick(("any", self.domain))][label].split(";")))
        sentences = ". ".join(parts).split(". ")
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)

    def verdict(self, label: int) -> str:
        """What the author thinks, in one sentence or two."""
        kind = self.pick(_VERDICT_KINDS)
        if kind == "clause":
            return self.clause(label)
        if kind == "contrast":
            return self.contrast(label)
        aspect = self.aspects.pop()
        if kind == "expectation":
            return self.expectation(label, aspect)
        return self.pick(_COUNTERFACTUALS[label]).format(aspect, self.adjective(aspect, 1 - label))

    def clause(self, label: int) -> str:
        """A judgement that can stand alone or within a contrast."""
        aspect, negated = self.aspects.pop(), self.chance(_NEGATED)
        word_label = 1 - label if negated else label
        kind = self.pick(("adjective", "adjective", "adjective", "adjective", "verb", "noun", "call"))
        if kind == "verb":
            past, infinitive = self.pick(_VERBS[word_label])
            return f"I {f'did not {infinitive}' if negated else past} the {aspect}"
        if kind == "noun":
            some = ("a lot of", "plenty of") if word_label else ("many", "a lot of", "plenty of")
            amount = self.pick(("no", "hardly any", "none of the usual") if negated else some)
            return f"the {aspect} had {amount} {self.pick(_NOUNS[word_label])}"
        adjective = self.adjective(aspect, word_label)
        if kind == "call":
            return f"{self.pick(_NOT_CALLED if negated else _CALLED)} the {aspect} {adjective}"
        affirmative = _AFFIRMATIONS if self.chance(0.25) else _INTENSIFIERS
        degree = self.pick(_NEGATIONS if negated else affirmative)
        return " ".join(filter(None, (f"the {aspect} was", degree, adjective)))

    def contrast(self, label: int) -> str:
        """Two judgements that disagree: the main clause, or the one after "but", decides."""
        losing = self.clause(1 - label)
        if self.chance(0.2):
            aspect = self.aspects.pop()
            outcomes = (f"that could not save the {aspect}", f"the {aspect} more than made up for it")
            return f"{losing}, but {outcomes[label]}"
        winning = self.clause(label)
        linked = losing + self.pick((", but ", ", but ", ", yet ", ". However, ")) + winning
        still = f"{losing}. Still, {winning}, and that is what counts"
        although = (f"although {losing}, {winning}", f"{winning}, although {losing}")
        return self.pick((linked, linked, linked, linked, still, *although))

    def expectation(self, label: int, aspect: str) -> str:
        """Something hoped, feared or heard, and whether it was so."""
        held = self.chance(0.5)
        word_label = label if held else 1 - label
        adjective = self.adjective(aspect, word_label)
        if self.chance(0.33):
            answers = (("and I disagree", "quite wrongly"), ("and I agree", "quite rightly"))
            answer = self.pick(answers[held])
            return f"{self.pick(_PEOPLE)} said that the {aspect} was {adjective}, {answer}"
        hoped = f"I had {('feared', 'hoped')[word_label]} that the {aspect} would be {adjective}"
        expected = self.pick((hoped, f"I expected the {aspect} to be {adjective}"))
        return f"{expected}, {'and so it was' if held else 'but it was not'}"

    def distractor(self) -> str:
        """An opinion that is not the author's, or not about this thing: it says nothing about the label."""
        label, person = self.pick((0, 1)), self.pick(_PEOPLE)
        aspect = self.pick(tuple(_ASPECTS[self.domain]))
        return self.pick(
            (
                f"{person} {self.pick(_VERBS[label])[0]} it",
                f"{person} found the {aspect} {self.adjective(aspect, label)}",
                f"{person} called the {aspect} {self.adjective(aspect, label)}",
                f"the last {self.thing} I {_TRIED[self.domain]} was {self.pick(_ADJECTIVES[label])}",
                f"the advert for it was {self.pick(_ADJECTIVES[label])}",
            )
        )

    def fact(self) -> str:
        day, time, number = self.pick(_DAYS), self.pick(_TIMES), self.pick(_NUMBERS)
        template = self.pick(_FACTS[self.domain].split(";"))
        return template.format(thing=self.thing, day=day, time=time, number=number)


def generate(seed: int = 0, sizes: dict[str, int] | None = None, noise: bool = True) -> dict[str, Rows]:
    """Compose the review set.

    Args:
        seed: Decides every text and label, the same on every platform.
        sizes: Rows per split, where they are not those of ``SPLITS``; 0 leaves a split empty.
        noise: Whether to flip labels as ``LABEL_NOISE`` says. Without noise the texts are the same.

    Returns:
        Split -> rows ``{"text", "label"}``. No text occurs twice. Labels index ``LABEL_NAMES``; they are
        balanced before the noise, and ``UNLABELED`` throughout the split "unlabeled".

    Raises:
        ValueError: If ``sizes`` names an unknown split or has a negative number.
    """
    sizes = {**SPLITS, **(sizes or {})}
    if unknown := sorted(set(sizes) - set(SPLITS)):
        raise ValueError(f"sizes must name splits among {list(SPLITS)}, got {unknown}")
    if negative := {split: n for split, n in sizes.items() if n < 0}:
        raise ValueError(f"sizes must be >= 0, got {negative}")
    seen: set[str] = set()
    return {split: _rows(split, sizes[split], seed, noise, seen) for split in SPLITS}


def _rows(split: str, n: int, seed: int, noise: bool, seen: set[str]) -> Rows:
    # A generator per purpose: noise does not shift the texts, nor one split's size another split's draws.
    text_rng, noise_rng = Random(f"{seed}/{split}/text"), Random(f"{seed}/{split}/noise")
    flips = _shuffled_bits(n, LABEL_NOISE.get(split, 0.0) if noise else 0.0, noise_rng)
    rows = []
    for label, flip in zip(_shuffled_bits(n, 0.5, text_rng), flips, strict=True):
        text = _Review(text_rng).text(label)
        while text in seen or text.count(".") > _MAX_SENTENCES:
            text = _Review(text_rng).text(label)
        seen.add(text)
        rows.append({"text": text, "label": UNLABELED if split == "unlabeled" else label ^ flip})
    return rows


def _shuffled_bits(n: int, share: float, rng: Random) -> list[int]:
    """``n`` zeros and ones in random order, ``share`` of them ones (to the nearest row)."""
    ones = int(n * share + 0.5)
    return sorted([1] * ones + [0] * (n - ones), key=lambda _: rng.random())


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerBase:
    """Train a lower-casing WordPiece tokenizer with BERT's special tokens, for BERT and DistilBERT.

    Args:
        texts: The texts to learn from.
        vocab_size: Upper bound of the vocabulary: special tokens and single characters count, and are kept.

    Returns:
        A Transformers tokenizer; saved, it is loaded again by ``AutoTokenizer``. The same texts give the
        same ids, and any word in ASCII letters and digits can be spelled.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    texts = list(texts)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    normalized = set("".join(tokenizer.normalizer.normalize_str(text) for text in texts))
    alphabet = sorted((normalized | set(ascii_lowercase + digits)) - set(whitespace))
    # The trainer numbers the "##x" pieces in the order of a randomly seeded hash map, and breaks ties between
    # merges by these numbers. Named beforehand, they have the same numbers in every process.
    pieces = [f"##{character}" for character in alphabet if character.isalnum()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special + pieces,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizerFast(
        vocab=tokenizer.get_vocab(),
        do_lower_case=True,
        model_max_length=128,
        # DistilBERT takes no token types, and BERT fills in the zeros that a single text needs.
        model_input_names=["input_ids", "attention_mask"],
    )
