"""What a first reader can take on trust from its name alone. Nothing here knows a VLM: it imports formats/
and the other files of this folder, nothing else."""
