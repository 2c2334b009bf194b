"""How close a text is to a music genre, as a number in [0, 1], by the sentence embedder MiniLM-L6-v2.

Each genre is the mean direction of a few anchor sentences. The score is the *contrast*: closeness to the wanted genre
minus the mean closeness to the other six. So a text that is only about music in general scores nothing.
"""

import contextlib
import math
import threading

import torch
from transformers import AutoModel, AutoTokenizer

ANCHORS = {
    "heavy metal": (
        "A heavy metal band roars through a wall of distorted guitars and double bass drums.",
        "Head-banging to thrash riffs, screaming vocals and leather jackets in the mosh pit.",
        "Black Sabbath, Metallica and Iron Maiden made metal loud, dark and fast.",
    ),
    "disco": (
        "Disco means a mirror ball, a four-on-the-floor beat and a crowded dance floor.",
        "Glittering nightclub lights, funky bass and strings in the days of Studio 54.",
        "Donna Summer, Chic and the Bee Gees made the seventies dance to disco.",
    ),
    "hip hop": (
        "Hip hop is rap over beats, samples and turntables, born in the Bronx.",
        "The rapper freestyles clever rhymes while the DJ scratches the record.",
        "Kendrick Lamar, Nas and Missy Elliott tell street stories with flow.",
    ),
    "jazz": (
        "Jazz is swing and improvisation by a saxophone trio in a small late-night club.",
        "The trumpet takes a solo over a walking bass and bebop chords.",
        "Miles Davis, John Coltrane and Ella Fitzgerald are heroes of jazz.",
    ),
    "classical": (
        "Classical music: a symphony orchestra plays under its conductor in the concert hall.",
        "A string quartet rehearses a sonata, an adagio and a fugue from the baroque era.",
        "Bach, Mozart and Beethoven composed classical symphonies and operas.",
    ),
    "blues": (
        "The blues are twelve bars of sorrow on a slide guitar from the Mississippi Delta.",
        "A worn-out singer moans about lost love and hard times in a juke joint.",
        "B.B. King, Muddy Waters and Robert Johnson sang the blues.",
    ),
    "folk": (
        "Folk songs are old ballads sung with an acoustic guitar, a banjo and a fiddle.",
        "Villagers gather round the fire and sing traditional tunes handed down for generations.",
        "Joan Baez, Woody Guthrie and Pete Seeger sang folk songs of the people.",
    ),
}


class GenreScorer:
    """The embedder, loaded on first use and shared by all threads, and one direction per genre."""

    # Measured on 224 answers of the untrained policy (8 questions x 7 personas x 4 samples, 28 tokens, temperature 1):
    # contrast 0.055 on average, standard deviation 0.10, nine in ten between -0.08 and 0.27. A sentence clearly about
    # the genre has 0.29 to 0.43. With these two numbers the contrasts 0.055, 0.15 and 0.35 score 0.17, 0.5 and 0.97:
    # most base answers are on the lower slope, where a step towards the genre pays, and few are at the top.
    MIDDLE, WIDTH = 0.15, 0.06

    def __init__(self, folder):
        self.folder = folder
        self._lock = threading.Lock()  # the host calls a reward from many threads of a process
        self._embedder = None
        self._directions = None

    def score(self, text, genre):
        """The score in [0, 1]. An empty text scores 0."""
        if not text.strip():
            return 0.0
        return 1.0 / (1.0 + math.exp((self.MIDDLE - self.contrast(text, genre)) / self.WIDTH))

    def contrast(self, text, genre):
        """Cosine with the wanted genre minus the mean cosine with the others."""
        if self._directions is None:
            means = torch.stack([self.embed(list(sentences)).mean(0) for sentences in ANCHORS.values()])
            self._directions = torch.nn.functional.normalize(means, dim=1)
        closeness = (self._directions @ self.embed([text])[0]).tolist()
        wanted = closeness.pop(list(ANCHORS).index(genre))
        return wanted - sum(closeness) / len(closeness)

    def embed(self, texts):
        """Mean of the last hidden states over the mask, scaled to unit length, as the model's authors specify."""
        with self._lock, one_thread():
            if self._embedder is None:
                self._embedder = AutoTokenizer.from_pretrained(self.folder), AutoModel.from_pretrained(self.folder)
            tokenizer, model = self._embedder
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@contextlib.contextmanager
def one_thread():
    """Limits torch to one thread: so small a model gains nothing from a second one, and loses much on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
