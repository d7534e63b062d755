"""The offline checker of an upper and its workdir."""
