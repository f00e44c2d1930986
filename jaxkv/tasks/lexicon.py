"""Words, names, numbers and identifiers the synthetic tasks are built from.

Every drawing function takes a `numpy.random.Generator` and returns distinct
strings. A key of the `eval` split never occurs in the `train` split: a word
belongs to `eval` exactly when `zlib.crc32(word) % 8 == 0`.
"""

import uuid
import zlib
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

Split = Literal["train", "eval"]

ADJECTIVES: tuple[str, ...] = tuple(
    """
    able abrupt absent acid active agile airy alert amber ample ancient angry arctic
    ardent arid ashen astute autumn awake aware azure balmy bare basic bitter black
    bland blank blind blithe blond blue blunt bold brash brave breezy brief bright
    brisk broad bronze brown bumpy burly busy calm candid careful casual chalky cheap
    cheery chilly civic civil clean clear clever cloudy clumsy coarse cobalt cold
    common copper coral cosmic cosy crafty crimson crisp crude cubic curious curly
    daily dainty damp daring dark deep dense dim distant dizzy docile double drab dry
    dual dull dusty eager early earnest easy elastic elder elegant empty equal eternal
    exact exotic faded faint fair famous fancy fast feeble fertile fickle fierce final
    fine firm flat fleet floral fluffy fond formal fragile frank free fresh frosty
    frugal full fuzzy gaudy gentle giant gifted glad gleaming glossy golden grand
    grassy grave gray great green gritty gusty hairy handy happy hardy harsh hasty
    hazel hearty heavy hidden high hollow honest humble hungry icy idle indigo inner
    ivory jade jolly jovial joyful keen kind large late lavish lazy lean level light
    lilac limber liquid little lively local lofty lone loud loyal lucid lucky lunar
    magenta major maroon mellow merry mighty mild minor misty modern modest moist muddy
    murky mute narrow native neat new nimble noble normal northern odd olive open oval
    pale patient plain pleased plucky plump polite proud pure purple quaint quick quiet
    rapid rare raw ready red regal rich rigid ripe robust rosy rough round royal rusty
    sandy scarlet secret serene shady sharp shiny short shy silent silky silver simple
    sleepy slender slow small smart smooth snowy sober soft solar solid sparse spicy
    steady steep stern still stout strict strong subtle sunny sweet swift tall tame
    tangy tender tepid thick thin tidy tiny tired tough tranquil true upper urban
    usual vague valid vast velvet vivid warm wary watery weary western white whole wide
    wild windy wise wooden woolly yellow young zesty
    """.split()
)

NOUNS: tuple[str, ...] = tuple(
    """
    acorn actor agent alarm album alley almond amulet anchor angle ankle anthem antler
    apple apron arcade arch archer armor arrow artist atlas attic author badge badger
    bagel baker balcony ballad balloon bamboo banjo banner barley barn barrel basin
    basket beach beacon bead bean bear beaver beetle bell bench berry bishop blanket
    blossom boat bonnet book boot border bottle boulder branch bread brick bridge brook
    broom brush bucket buckle buffalo bugle bundle bunker burrow butter button cabin
    cable cactus camel camera canal candle canoe canvas canyon captain caravan cargo
    carpet carrot castle cathedral cave cedar cellar chair chalk channel chapel chart
    cherry chest chimney cider cinema circle citadel clarinet clay cliff clock cloud
    clover coach coast cobbler coffee collar column comet compass concert condor cookie
    corner cottage cotton cradle crane crater creek cricket crown crystal cup curtain
    cushion cymbal dagger daisy dancer dawn deer delta desert desk diamond dial doctor
    dolphin donkey door dragon drawer drum duchess dune eagle easel echo elbow elm
    ember emerald engine envelope ermine estate falcon farmer feather fence fern ferry
    fiddle field finch flag flame flask flute fog forest forge fortress fountain fox
    frame freckle frog galaxy gallery garden garlic gate gazelle ginger glacier glade
    glove goblet goose granite grape gravel grove guitar gull hammer hammock harbor
    harp hat hawk hedge helmet heron hill honey hood horizon horn horse hotel hut
    inlet island ivy jacket jaguar jar jasmine jetty jewel judge jungle kayak kennel
    kettle key kite kitten knight ladder lagoon lake lamp lantern lark lattice lava
    leaf ledge lemon lens letter lever library lily linen lion lizard lobster locket
    lodge log lotus lute lynx magnet mango mantle map maple marble market marsh mast
    meadow melon merchant meteor mill mint mirror mitten moat mole monk moon moss moth
    motor mountain museum needle nest nettle notebook nutmeg oak oar oasis ocean onion
    orange orchard orchid organ otter oven owl oyster paddle palace panther paper
    parade parcel parrot path pear pearl pebble pelican pencil pepper piano pier pigeon
    pillar pillow pilot pine pipe planet plank plum pocket poem poet pond pony poplar
    poppy porch prairie prism puddle pumpkin puppet quail quarry quartz quill quilt
    rabbit radio raft rain ranch raven reef ribbon ridge river road robin rocket roof
    rope rose ruby rudder saddle sail salmon sandal sapphire scarf school scooter seal
    shadow shell shepherd ship shovel shrine signal sleigh sparrow spear spider spoon
    spruce squire stable stage star statue stone storm stove stream studio summit swan
    sword table tailor temple tent thicket thistle thread throne tiger timber torch
    tower trail train trumpet tulip tunnel turtle valley vase village vine violin
    volcano wagon walnut walrus wave whale wheat wheel whistle willow window wolf yard
    zebra
    """.split()
)

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES: tuple[str, ...] = tuple(c + v for c in CONSONANTS for v in VOWELS)
UPPERCASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def split_of(word: str) -> Split:
    """Return the split a word belongs to; one word in eight is `eval`."""
    return "eval" if zlib.crc32(word.encode()) % 8 == 0 else "train"


def of_split(words: Iterable[str], split: Split) -> tuple[str, ...]:
    """Return the words of one split, in the given order."""
    return tuple(word for word in words if split_of(word) == split)


_POOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    split: (of_split(ADJECTIVES, split), of_split(NOUNS, split))
    for split in ("train", "eval")
}


def adjectives(split: Split) -> tuple[str, ...]:
    """Return the adjectives of a split."""
    return _POOLS[split][0]


def nouns(split: Split) -> tuple[str, ...]:
    """Return the nouns of a split."""
    return _POOLS[split][1]


def _distinct(draw: Callable[[int], Iterable[str]], count: int) -> list[str]:
    """Call `draw(n)` until `count` distinct strings came; keep their order."""
    found: dict[str, None] = {}
    for _ in range(64):
        found.update(dict.fromkeys(draw(count - len(found) + 2)))
        if len(found) >= count:
            return list(found)[:count]
    raise ValueError(
        f"Expected to draw {count} distinct words, the pool gave {len(found)}. "
        "Ask for fewer keys or use pseudo-words or UUIDs."
    )


def names(
    rng: np.random.Generator,
    count: int,
    split: Split,
    *,
    syllables: tuple[int, int] = (2, 3),
) -> list[str]:
    """Draw distinct pseudo-words such as "kimalo".

    Args:
      rng: Source of randomness.
      count: Number of words.
      split: Split every word belongs to.
      syllables: Least and largest number of syllables, both included.
    """
    low, high = syllables
    # Only one word in eight is kept for "eval", so draw more there.
    surplus = 9 if split == "eval" else 1.2

    def draw(n: int) -> Iterable[str]:
        n = int(n * surplus) + 1
        parts = rng.integers(0, len(SYLLABLES), size=(n, high)).tolist()
        sizes = rng.integers(low, high + 1, size=n).tolist()
        words = (
            "".join([SYLLABLES[i] for i in row[:size]])
            for row, size in zip(parts, sizes, strict=True)
        )
        return of_split(words, split)

    return _distinct(draw, count)


def strange(rng: np.random.Generator, count: int) -> list[str]:
    """Draw words of three to nine random small letters, for training to copy."""
    letters = rng.integers(0, 26, size=(count, 9)).tolist()
    sizes = rng.integers(3, 10, size=count).tolist()
    return [
        "".join(chr(ord("a") + i) for i in row[:size])
        for row, size in zip(letters, sizes, strict=True)
    ]


def word_keys(
    rng: np.random.Generator, count: int, split: Split, *, invented: bool = False
) -> list[str]:
    """Draw distinct "adjective-noun" keys; both words belong to the split.

    Args:
      rng: Source of randomness.
      count: Number of keys.
      split: Split both words belong to.
      invented: Put a pseudo-word in the noun's place. Also done for every key once
        more than three fifths of the real pairs would be needed.
    """
    first, second = _POOLS[split]
    if invented or 5 * count > 3 * len(first) * len(second):
        second = tuple(names(rng, count, split))
    if invented and rng.random() < 0.5:
        first = of_split(strange(rng, 2 * count + 16), split)

    def draw(n: int) -> Iterable[str]:
        left = rng.integers(0, len(first), size=n).tolist()
        right = rng.integers(0, len(second), size=n).tolist()
        return [f"{first[a]}-{second[b]}" for a, b in zip(left, right, strict=True)]

    return _distinct(draw, count)


def numbers(rng: np.random.Generator, count: int, *, digits: int = 7) -> list[str]:
    """Draw distinct decimal numbers without leading zeros."""
    low, high = 10 ** (digits - 1), 10**digits
    return _distinct(
        lambda n: map(str, rng.integers(low, high, size=n).tolist()), count
    )


def uuids(
    rng: np.random.Generator, count: int, split: Split | None = None
) -> list[str]:
    """Draw distinct version-4 UUIDs; of one split if it is given."""
    surplus = 9 if split == "eval" else 1.2 if split else 1

    def draw(n: int) -> Iterable[str]:
        n = int(n * surplus) + 1
        raw = rng.bytes(16 * n)
        texts = (
            str(uuid.UUID(bytes=raw[i : i + 16], version=4))
            for i in range(0, len(raw), 16)
        )
        return of_split(texts, split) if split else texts

    return _distinct(draw, count)


def variables(rng: np.random.Generator, count: int, split: Split) -> list[str]:
    """Draw distinct variable names of five capital letters, such as "QKZTA"."""
    surplus = 9 if split == "eval" else 1.2

    def draw(n: int) -> Iterable[str]:
        letters = rng.integers(0, 26, size=(int(n * surplus) + 1, 5)).tolist()
        return of_split(("".join(UPPERCASE[i] for i in row) for row in letters), split)

    return _distinct(draw, count)
