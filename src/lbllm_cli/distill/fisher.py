"""How much the model's own predictions hang on each direction of a block's outputs: its Fisher information there.

Where a block's outputs are off by a small d, the divergence of the model's next-token distributions from what they were is about
d F d^T / 2 for each token, with F the mean of g g^T and g the gradient, by the output of a token, of the log-likelihood of tokens
that are drawn from these distributions. So errors of a block are measured by F where they are to say what they do to the end.
"""

import torch
from torch import Tensor, nn

from lbllm_cli.models.block import Block
from lbllm_cli.models.head import Head
from lbllm_cli.pipeline.metrics import massive_tokens


@torch.no_grad()
def prediction_slopes(states: Tensor, head: Head, chance: Tensor) -> Tensor:
    """Gradient of the log-likelihood of one drawn next token at each position, by the states there.

    states: after the last norm [n, hidden]. chance: float32 [n] in [0, 1); the token drawn is that at which the sum of all
    likelihoods up to it passes it. Returns [n, hidden], in the dtype of the states.
    (512, 576), 49152 x 576, (512,) -> (512, 576).
    """
    found = torch.empty_like(states)
    for piece in head.pieces(len(states)):
        logits = head.exact(states[piece])
        likelihood = logits.softmax(-1)
        passed = likelihood.cumsum(-1)
        # Rounding may leave the whole sum at a little less than 1.
        drawn = torch.searchsorted(passed, chance[piece].unsqueeze(-1) * passed[:, -1:], right=True)
        slope = likelihood.neg_()
        slope.scatter_add_(-1, drawn.clamp_(max=slope.shape[-1] - 1), slope.new_ones(()).expand(len(slope), 1))
        found[piece] = (head.chained(slope, logits).to(head.weight.dtype) @ head.weight).to(found.dtype)
    return found


def last_slopes(states: Tensor, norm: nn.Module, head: Head, chance: Tensor) -> Tensor:
    """As `prediction_slopes`, by states before the norm: [rows, length, hidden], chance [rows, length]."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        normed: Tensor = norm(states)
    slopes = prediction_slopes(normed.detach().flatten(0, 1), head, chance.flatten())
    return _through(states, normed, slopes.view_as(normed))


def slopes_before(block: Block, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Gradients by a block's inputs [rows, length, hidden] out of those by its outputs, of one shape."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = block(inputs)
    return _through(inputs, outputs, slopes)


def _through(inputs: Tensor, outputs: Tensor, slopes: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(outputs, inputs, slopes.to(outputs.dtype))
    return found


def add_information(total: Tensor, outputs: Tensor, slopes: Tensor) -> None:
    """Adds g g^T of ordinary tokens to `total`, float32 [hidden, hidden]: what massive ones are off by is not small.

    outputs: of the block [rows, length, hidden]. slopes: by them, of that shape.
    """
    kept = torch.where(massive_tokens(outputs).unsqueeze(-1), 0, slopes.float()).flatten(0, 1)
    total.addmm_(kept.T, kept)


def metric_factor(information: Tensor, share: float, scale: Tensor | None) -> Tensor:
    """L, float32 [hidden, hidden], such that |d L|^2 is what an error d counts: `share` of it by the information, as if all
    directions had 1 on average, the rest by channels.

    scale: of channels [hidden], see `channel_scale`; None: they count alike. Information of 0: all of it by channels.
    diag(3, 1), 0.5 -> diag(sqrt(1.25), sqrt(0.75)).
    """
    information = information.double()
    channels = torch.ones_like(information[0]) if scale is None else scale.double().square()
    usual = information.diagonal().mean()
    unit = information / usual if float(usual) > 0 else torch.diag(channels)
    return torch.linalg.cholesky(share * unit + (1 - share) * torch.diag(channels)).float()
