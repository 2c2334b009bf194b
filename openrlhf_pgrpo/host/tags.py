"""Values of the host's data that also say whose they are.

The host drops every dataset column except a few, and hands these on unchanged: a prompt in PPO, a pair's number of
prompt tokens in DPO, a pair's margin in reward training. So each is replaced by an equal value that carries more. It
is compared, hashed, printed and used as the plain value, and pickled with what it carries.
"""


class TaggedPrompt(str):
    """A prompt of PPO with its preference group and its user; either may be None."""

    pref_group: str | None
    user: str | None

    def __new__(cls, prompt: str, pref_group: str | None, user: str | None = None):
        self = super().__new__(cls, prompt)
        self.pref_group, self.user = pref_group, user
        return self

    def __reduce__(self):
        return TaggedPrompt, (str(self), self.pref_group, self.user)


class TaggedLength(int):
    """A number of prompt tokens of DPO with its pair's preference group."""

    pref_group: str

    def __new__(cls, length: int, pref_group: str):
        self = super().__new__(cls, length)
        self.pref_group = pref_group
        return self

    def __reduce__(self):
        return TaggedLength, (int(self), self.pref_group)


class TaggedMargin(float):
    """A margin of reward training with its pair's user, as a row of the table, and the preference for the chosen
    response, from 0 to 1."""

    user: int
    preference: float

    def __new__(cls, margin: float, user: int, preference: float):
        self = super().__new__(cls, margin)
        self.user, self.preference = user, preference
        return self

    def __reduce__(self):
        return TaggedMargin, (float(self), self.user, self.preference)
