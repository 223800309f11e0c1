"""Several processes at one stage: who has which sequences and linears, and what they tell each other."""
