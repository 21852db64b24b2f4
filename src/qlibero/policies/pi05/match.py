"""Whether a network, a profile and a tokenizer can be parts of one policy."""

from __future__ import annotations

from qlibero.errors import UserError
from qlibero.policies.pi05.config import Pi05Config
from qlibero.policies.pi05.profiles import STATE_NUMBERS, Profile
from qlibero.policies.pi05.tokenizer import Tokenizer

ACTION_NUMBERS = 7


def require_match(config: Pi05Config, profile: Profile, tokenizer: Tokenizer) -> None:
    """`UserError` when these cannot be parts of one policy."""
    if profile.prompt == "proj" and config.state_dim != profile.state_numbers:
        raise UserError(
            f"profile {profile.name} feeds {profile.state_numbers} state numbers, the network's state token "
            f"takes {config.state_dim}"
        )
    if profile.prompt == "suffix" and config.state_dim < STATE_NUMBERS:
        raise UserError(
            f"the network's state token takes {config.state_dim} numbers, LIBERO's robot has {STATE_NUMBERS}"
        )
    if config.action_dim < ACTION_NUMBERS:
        raise UserError(
            f"the network's actions have {config.action_dim} numbers, LIBERO's robot takes {ACTION_NUMBERS}"
        )
    if config.vision.type == "conv" and config.vision.cameras != 2:
        raise UserError(f"the network has {config.vision.cameras} cameras, LIBERO feeds two")
    if config.state_dim and profile.prompt not in ("proj", "suffix"):
        raise UserError(
            f"the network has a state token of {config.state_dim} numbers, which profile {profile.name} does not feed"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the network's embedding {config.vocab_size}: "
            "they do not belong together"
        )
