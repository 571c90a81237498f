"""Small utilities that all scripts share, one word of the field per file.

A first reading, in this order:

    data           rows from a hub id or a file: formats, checks, splits by prompt
    formats        the field's formats as rows of ours: conversations, pairs, scores
    templates      what a chat template writes, and where an answer begins and ends in it
    tokenization   tokenizers, stop tokens; rows to token ids
    batches        ragged sequences to micro-batches; positions; one pass over all of them
    logprobs       log pi(y | x) and entropy, in chunks
    value_heads    V(s_1), Q(s_t, a_t), a reward model's score, and the head that says it
    rollout        sampling: a token, a batch, all prompts; is what samples what trains?
    rewards        a reward model, or a function of yours
    reference      the frozen reference; its numbers kept in the run folder

What makes it run on one CPU and on many GPUs:

    pretrained     a name to a folder or hub id, and one part of it through transformers
    checks         a model compared with its own forward when it is opened
    positions      how long a sequence a model reads
    models         opening a model of a kind: checked, with its head, sharded
    distributed    processes, and the mesh they form
    sharding       FSDP2
    optimizer      AdamW, learning rate, accumulation, the guarded step
    checkpoints    resume and export
    durable        files that survive a crash, checksums, pickles that run nothing
    model_card     the README.md of an exported folder
    cli, log       the command line; the run folder
    preemption     being asked to stop
    lock           one run a folder
    meter          seconds, memory, model FLOPs utilisation
    measures       pair accuracies, diversity
    tables         Markdown tables

What a first reading skips: lora, t5, context, decoding, offload, vllm, pictures.

Arrows run down: a file imports only files that are further from the scripts than it is, never a script, and
nothing in a circle; tests/test_house.py keeps it so.
"""
