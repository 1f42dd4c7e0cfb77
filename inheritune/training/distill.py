"""Knowledge distillation: the student learns the text and, token by token, the teacher's whole distribution."""

from torch.nn import functional as F


def distillation_loss(logits, teacher_logits, targets, n_vocab, alpha, temperature):
    """(loss, ce, kl), fp32 scalars: alpha · CE + (1 - alpha) · T² · KL(teacher ‖ student) (paper, App. D).

    logits, teacher_logits: (B, T, ≥ n_vocab); targets: (B, T) ids. CE is the mean over tokens that training without a
    teacher has. KL is summed over the tokenizer's n_vocab ids, both sides normalised over these alone at the
    temperature, then averaged over tokens. (A mean over the vocabulary instead would divide it by fifty thousand, and
    the published logs look as if theirs did.)
    """
    ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    student = F.log_softmax(logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    teacher = F.log_softmax(teacher_logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)  # batchmean: sum over ids, mean over tokens
    return alpha * ce + (1 - alpha) * temperature**2 * kl, ce, kl
