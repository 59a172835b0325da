"""Other people's files: what lies on disks and hubs, read into plain values.

What belongs here: code that would not exist if nobody else had ever saved a model or a data set.
It imports none of the files at the top.
"""
