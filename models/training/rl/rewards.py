"""Rewards that a program can check: what a sample's tokens are, never what they mean."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

# Names in recipes, and which texts of tokens are wanted.
REWARDS: dict[str, Callable[[str], bool]] = {
    "digit_share": lambda text: any(character.isdigit() for character in text),
    "word_start_share": lambda text: text[:1] == " " and text[1:].isalpha(),
}


class Reward:
    """The share of a sample's tokens that are of the wanted kind, 0 to 1."""

    def __init__(self, name: str, tokenizer: Tokenizer):
        is_wanted = REWARDS[name]
        size = tokenizer.get_vocab_size()
        self.wanted = frozenset(token for token in range(size) if is_wanted(tokenizer.decode([token])))

    def __call__(self, output_ids: Sequence[int]) -> float:
        return sum(token in self.wanted for token in output_ids) / max(1, len(output_ids))


def prompt_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that random prompts are made of: all but the added ones, which steer chats."""
    added = tokenizer.get_added_tokens_decoder()
    return [token for token in range(tokenizer.get_vocab_size()) if token not in added]
