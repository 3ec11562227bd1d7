"""Every word the nano model may say or be asked: one place, so that the vocabulary can be closed over it.

Words of the world (kinds, colours, sizes, places), words it reads, and the words that questions use.
"""

from __future__ import annotations

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
READ_WORDS = (
    "cat", "dog", "sun", "sea", "map", "key", "cup", "hat", "box", "pen",
    "car", "bus", "tree", "fish", "bird", "moon", "home", "door", "lamp", "rain",
    "snow", "wind", "fire", "road", "ship", "milk", "book", "hand", "cake", "time",
)  # fmt: skip
DEFAULT_SYSTEM = "You are a helpful assistant."

_QUESTION_WORDS = """
a about above after all alone an and animal any answer anything appear appears apple are around ask
assistant at away background be becomes been before begin below beneath between big bigger bottom bounding
boxes briefly bright but by bye became new differs another sum total I both belong can cannot caption center
centre change changed changes character characters clip close color colored colors colour coloured colours
come comes contain contains contents coordinates corner correct could count dark describe description detail
details detect did differ difference differences different digit digits direction do does doing down draw
drawing drawn each edge eight else empty end english every everything exactly fast figure figures find first
five for four fourth frame frames from full give given go goes good goodbye greater ground grow grows had
happen happened happening happens has have he hello help helpful here hey hi hidden how i identical image
images in inside into is it item items its itself just kind kinds know language large larger largest last
least left length less let letter letters light like line lines list little locate located location long
look low main make man many me means middle missing model more most motion move moved movement moves moving
much my name nano nano-sized near next nine no noise noisy none not nothing now number numbers object
objects of off on once one only open or order other out outside over page pair part patch path person photo
pic picture pictures place placed plain please point position present print printed question questions read
reading reads recognise red region replaced reply reverse right room round row rows same saw say says scene
screen second see seen sentence seven shape shapes short show shown shows side sign six size sizes small
smaller smallest so some something still stay stays stopped story sure symbol symbols take tell ten text
than thank thanks that the their them then there these they thing things third this three through to
together top total toward towards transcribe true twice two type typed under unknown up upper us using very
video videos view visible want was way we well were what where whether which while white who whole why will
with without word words work write writing written wrong yes you your zero
"""

_FRAGMENTS = (
    "'s", "I'm", "don't", "can't", "isn't", "doesn't", "Qwen", "Qwen2", "VL", "qvl", " qvl", " Qwen",
    " Qwen2", "-VL", ".", ",", "?", "!", ":", ";", "-", "(", ")", "),(", ",(", '"', "'", ".\n", "?\n", ":\n",
    ",\n", "\n", "\n\n", " ", "  ", " (", ").", '".', '"?', ' "', "...", "/", "0", "1", "2", "3", "4", "5",
    "6", "7", "8", "9", " Show", " I", "system", "user", "assistant",
)  # fmt: skip


def corpus() -> list[str]:
    """Strings whose Qwen tokens (and the merges on the way) make up the vocabulary."""
    words = set(_QUESTION_WORDS.split()) | set(READ_WORDS) | set(KINDS) | set(COLOURS) | set(SIZES)
    words |= {k + "s" for k in KINDS} | {"crosses", "bodies"}
    for place in PLACES:
        words |= set(place.split())
    out = list(_FRAGMENTS)
    for word in sorted(words):
        out += [word, " " + word, word.capitalize()]
    return out
