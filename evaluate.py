import torch
def distances(q, g):
    return torch.cdist(q.transpose(0,1), g.transpose(0,1)).mean(0)
