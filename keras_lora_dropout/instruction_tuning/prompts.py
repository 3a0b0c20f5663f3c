"""The prompts that Alpaca's instructions are put in."""

_INTRODUCTION = (
    "Below is an instruction that describes a task{}. Write a response that "
    "appropriately completes the request."
)


def alpaca_prompt(instruction, input=""):
    """Write an instruction as Alpaca's prompt.

    The answer comes right after it, on a line of its own.

    Reference: [Stanford Alpaca](https://github.com/tatsu-lab/stanford_alpaca),
    the data of [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Table 3.

    Args:
        instruction: String. What is to be done.
        input: String. What it is to be done to; may be empty.

    Returns:
        String.

    Raises:
        TypeError: If one of the two is no string.
        ValueError: If the instruction is empty.

    Example:

    >>> print(alpaca_prompt("Name a colour."))
    Below is an instruction that describes a task. Write a response that
    appropriately completes the request.
    <BLANKLINE>
    ### Instruction:
    Name a colour.
    <BLANKLINE>
    ### Response:
    <BLANKLINE>
    """
    for name, value in (("instruction", instruction), ("input", input)):
        if not isinstance(value, str):
            raise TypeError(
                f"`{name}` must be a string. Received: {name}={value!r} (of "
                f"type {type(value).__name__})."
            )
    if not instruction.strip():
        raise ValueError(
            "`instruction` must say what is to be done. Received: "
            f"instruction={instruction!r}."
        )
    context = ", paired with an input that provides further context"
    has_input = bool(input.strip())
    parts = [
        _INTRODUCTION.format(context if has_input else ""),
        f"### Instruction:\n{instruction}",
    ]
    if has_input:
        parts.append(f"### Input:\n{input}")
    return "\n\n".join([*parts, "### Response:\n"])
